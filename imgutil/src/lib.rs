//! The library behind `imgutil`: builds root images, starts them like containers, packs, unpacks and checks them.

pub mod cmd;
