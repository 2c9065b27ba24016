//! Which URLs name a server.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use moor_tether::reader::{Address, AddressError};

#[test]
fn what_is_no_https_url_is_named() {
    for url in ["http://127.0.0.1/x.moor", "https://127.0.0.1", "x.moor", ""] {
        let error = Address::resolve(url).unwrap_err();
        assert!(matches!(error, AddressError::Form(_)), "{url}");
        assert!(error.to_string().contains(&format!("'{url}' is not a URL of the form https://HOST[:PORT]/PATH")));
    }
}
