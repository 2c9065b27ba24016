//! What software an image is made of: its packages, as a list that other programs read (SPDX 2.3).

pub mod database;
mod license;
