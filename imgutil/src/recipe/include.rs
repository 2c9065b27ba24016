//! Reading a recipe with the files it includes, and putting them together.

use super::{File, Key, Recipe, RecipeError, Repository, What};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

/// Largest recipe that is read, in bytes.
const SIZE_LIMIT: u64 = 1 << 20;
/// So many files may include one another in a row.
const DEPTH_LIMIT: usize = 16;
/// So many files may make one recipe.
const COUNT_LIMIT: usize = 256;

/// Reads the recipe at `path` and all that it includes.
pub(super) fn read(path: &Path) -> Result<Recipe, RecipeError> {
    let mut reader = Reader { open: Vec::new(), count: 0 };
    reader.read(path)
}

struct Reader {
    /// The files between the first one and this one, by their real names.
    open: Vec<PathBuf>,
    count: usize,
}

impl Reader {
    fn read(&mut self, path: &Path) -> Result<Recipe, RecipeError> {
        let failed = |error| RecipeError::Read(path.to_path_buf(), error);
        let real = path.canonicalize().map_err(failed)?;
        let text = read_text(path).map_err(failed)?;
        let mut recipe = Recipe::parse(&text, path)?;
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        locate(&mut recipe, &std::path::absolute(directory).map_err(failed)?);
        recipe.read_from = vec![path.to_path_buf()];

        self.open.push(real);
        let mut base = Recipe::default();
        for included in std::mem::take(&mut recipe.include) {
            let included = directory.join(included);
            self.check(path, &included)?;
            let below = self.read(&included).map_err(|error| match error {
                // Which file wanted it says more than its name alone.
                RecipeError::Read(missing, error) if missing == included => {
                    RecipeError::Include { path: path.to_path_buf(), included: missing, message: error.to_string() }
                }
                error => error,
            })?;
            base = merge(base, below);
        }
        self.open.pop();
        Ok(merge(base, recipe))
    }

    fn check(&mut self, path: &Path, included: &Path) -> Result<(), RecipeError> {
        self.count += 1;
        let message = if included.canonicalize().is_ok_and(|real| self.open.contains(&real)) {
            "it includes this one already: that would never end".to_owned()
        } else if self.open.len() >= DEPTH_LIMIT {
            format!("files may include one another at most {DEPTH_LIMIT} times in a row")
        } else if self.count > COUNT_LIMIT {
            format!("at most {COUNT_LIMIT} files may make one recipe")
        } else {
            return Ok(());
        };
        Err(RecipeError::Include { path: path.to_path_buf(), included: included.to_path_buf(), message })
    }
}

fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let length = std::fs::File::open(path)?.take(SIZE_LIMIT + 1).read_to_string(&mut text)?;
    if length as u64 > SIZE_LIMIT {
        return Err(io::Error::other("it is larger than 1 MiB"));
    }
    Ok(text)
}

/// Makes the paths on the host absolute.
fn locate(recipe: &mut Recipe, directory: &Path) {
    // A description of an operating system; its name has no slash.
    if let Some(os) = recipe.os.as_mut().filter(|os| os.contains('/')) {
        *os = directory.join(&*os).display().to_string();
    }
    for File { what, .. } in &mut recipe.files {
        if let What::Copy(source) = what {
            *source = directory.join(&source);
        }
    }
    for Repository { key, .. } in &mut recipe.repositories {
        if let Key::File(path) = key {
            *path = directory.join(&path);
        }
    }
}

/// `over` on top of `base`.
fn merge(base: Recipe, over: Recipe) -> Recipe {
    fn joined<T>(mut first: Vec<T>, second: Vec<T>) -> Vec<T> {
        first.extend(second);
        first
    }
    Recipe {
        include: Vec::new(),
        os: over.os.or(base.os),
        arch: over.arch.or(base.arch),
        base: over.base.or(base.base),
        mirror: over.mirror.or(base.mirror),
        security_mirror: over.security_mirror.or(base.security_mirror),
        repositories: joined(base.repositories, over.repositories),
        packages: joined(base.packages, over.packages),
        remove: joined(base.remove, over.remove),
        groups: joined(base.groups, over.groups),
        users: joined(base.users, over.users),
        files: joined(base.files, over.files),
        services: joined(base.services, over.services),
        disable: joined(base.disable, over.disable),
        locale: over.locale.or(base.locale),
        timezone: over.timezone.or(base.timezone),
        run: joined(base.run, over.run),
        read_from: joined(base.read_from, over.read_from),
    }
}
