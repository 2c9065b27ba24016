//! One module per subcommand: its arguments and the few lines that call the library and print.

pub mod build;
pub mod exec;
pub mod inspect;
pub mod pack;
pub mod unpack;
pub mod verify;
