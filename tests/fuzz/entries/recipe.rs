//! A recipe: a mistake is one line that names the file.

use imgutil::recipe::{Recipe, is_package_name};
use std::path::Path;

pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Recipe::parse(text, Path::new("recipe.toml")) {
        Ok(recipe) => {
            let words = recipe.packages.iter().map(|item| item.value.0.as_str());
            assert!(words.into_iter().all(|word| is_package_name(word.strip_prefix('-').unwrap_or(word))));
            assert!(recipe.files.iter().all(|file| file.path.0.is_absolute()));
        }
        Err(error) => {
            let message = error.to_string();
            assert!(message.contains("recipe.toml"), "{message}");
        }
    }
}
