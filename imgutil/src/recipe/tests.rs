use super::*;

fn parse(text: &str) -> Recipe {
    Recipe::parse(text, Path::new("r.toml")).unwrap()
}

fn error(text: &str) -> String {
    Recipe::parse(text, Path::new("r.toml")).unwrap_err().to_string()
}

#[test]
fn a_recipe_says_everything_an_image_is_made_of() {
    let recipe = parse(
        r#"
        os = "debian-12"
        arch = "amd64"
        packages = [
            "vim", "g++", "-nano", "linux-image-6.1.0-50-amd64=6.1.1-1",
            { name = "intel-microcode", arch = "amd64" }, { names = ["a1", "b1"], os = ["debian"], version = ">=13" },
        ]
        remove = ["exim4"]
        services = ["chrony.service"]
        disable = ["ssh.socket"]
        timezone = "Europe/Berlin"
        run = ["echo hello > /etc/motd", { command = "true", arch = "arm64" }]
        [[repository]]
        uri = "https://example.org/apt"
        suites = ["stable"]
        components = ["main"]
        key = "example.asc"
        [[repository]]
        uri = "https://example.org/rpm"
        unsigned = true
        [[file]]
        path = "/etc/motd.tail"
        content = "x"
        mode = "0600"
        owner = "op:adm"
        [[file]]
        path = "/srv"
        directory = true
        [[user]]
        name = "op"
        groups = ["sudo"]
        ssh-keys = ["ssh-ed25519 AAAA op"]
        "#,
    );
    assert_eq!(recipe.os.as_deref(), Some("debian-12"));
    assert_eq!(recipe.packages.len(), 7);
    assert_eq!(recipe.files[0].mode, Some(Mode(0o600)));
    assert_eq!(recipe.files[0].owner, Some(Owner { user: "op".to_owned(), group: Some("adm".to_owned()) }));
    assert_eq!(recipe.files[1].what, What::Directory);
    assert_eq!(recipe.users[0].groups, [Name("sudo".to_owned())]);
    assert_eq!(recipe.repositories[0].key, Key::File(PathBuf::from("example.asc")));
    assert_eq!(recipe.repositories[1].key, Key::Unsigned);
}

#[test]
fn what_is_wrong_is_named_with_its_line() {
    for (text, expected) in [
        ("os = \"debian-12\"\npackage = []\n", "recipe 'r.toml', line 2: unknown field `package`"),
        ("os = \"debian-12\"\n\npackages = [\"V m\"]", "recipe 'r.toml', line 3: 'V m' is no package name"),
        ("packages = [\n\"vim\",\n\"vim-\"]", "recipe 'r.toml', line 3: 'vim-' is no package name"),
        ("packages = [\"--o\"]", "recipe 'r.toml', line 1: '--o' is no package name"),
        ("packages = [\n{ nam = \"vim\" }]", "recipe 'r.toml', line 2: unknown field `nam`"),
        ("packages = [\n{ arch = \"amd64\" }]", "recipe 'r.toml', line 2: an entry needs 'name'"),
        ("packages = [\n{ name = \"vim\", version = \"new\" }]", "recipe 'r.toml', line 2: 'new' is no version"),
        ("os = [", "recipe 'r.toml', line 1: "),
        ("base = \"huge\"", "recipe 'r.toml', line 1: unknown variant `huge`"),
        ("\n[[file]]\npath = \"/a\"", "recipe 'r.toml', line 2: file '/a': give one of 'source', 'content'"),
        ("[[file]]\npath = \"a\"\ncontent = \"\"", "recipe 'r.toml', line 2: 'a': the path must be absolute"),
        (
            "[[file]]\npath = \"/a/../b\"\ncontent = \"\"",
            "recipe 'r.toml', line 2: '/a/../b': the path must be absolute",
        ),
        ("[[file]]\npath = \"/a\"\ncontent = \"\"\nmode = \"9\"", "recipe 'r.toml', line 4: '9' is no file mode"),
        (
            "[[file]]\npath = \"/a\"\nlink = \"b\"\nmode = \"644\"",
            "recipe 'r.toml', line 1: file '/a': a link has no mode",
        ),
        ("[[file]]\npath = \"/a\"\ncontent = \"\"\nowner = \"a b\"", "recipe 'r.toml', line 4: 'a b' is no owner"),
        ("[[repository]]\nuri = \"x\"\nsuites = [\"a\"]", "recipe 'r.toml', line 1: repository 'x' has no key"),
        (
            "[[repository]]\nuri = \"x\"\nkey = \"k\"\nunsigned = true",
            "recipe 'r.toml', line 1: repository 'x' has a key",
        ),
        ("[[user]]\nname = \"-rf\"", "recipe 'r.toml', line 2: '-rf' is no name of a user"),
        ("mirror = \"http://a b\"", "recipe 'r.toml', line 1: 'http://a b' is no address"),
        ("timezone = \"../etc\"", "recipe 'r.toml', line 1: '../etc' is no time zone"),
    ] {
        let error = error(text);
        assert!(error.starts_with(expected), "{text:?}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn conditions_are_about_the_target() {
    let target = |os, arch: &'static str| {
        let machine = if arch == "amd64" { "x86_64" } else { "aarch64" };
        Target { os, machine, arch }
    };
    for (condition, os, arch, expected) in [
        ("", "debian-12", "amd64", true),
        ("arch = \"amd64\"", "debian-12", "amd64", true),
        ("arch = \"x86_64\"", "debian-12", "amd64", true),
        ("arch = [\"arm64\", \"riscv64\"]", "debian-12", "amd64", false),
        ("os = \"debian\"", "debian-12", "amd64", true),
        ("os = \"debian-13\"", "debian-12", "amd64", false),
        ("os = \"ubuntu\"", "debian-12", "amd64", false),
        ("version = \"12\"", "debian-12", "amd64", true),
        ("version = \">=13\"", "debian-12", "amd64", false),
        ("version = \">=9\"", "debian-12", "amd64", true),
        ("version = \">=12,<14\"", "debian-13", "amd64", true),
        ("os = \"centos-stream\", version = \">=9\"", "centos-stream-9", "amd64", true),
        ("version = \"<10\"", "centos-stream-10", "amd64", false),
        ("version = \">24.04\"", "ubuntu-24.04", "amd64", false),
        ("version = \"<=24.4\"", "ubuntu-24.04", "amd64", true),
        ("os = \"debian\", version = \"12\", arch = \"amd64\"", "debian-12", "arm64", false),
    ] {
        let separator = if condition.is_empty() { "" } else { ", " };
        let recipe = parse(&format!("packages = [{{ name = \"vim\"{separator}{condition} }}]"));
        assert_eq!(recipe.packages[0].when.holds(target(os, arch)), expected, "{condition} {os} {arch}");
    }
}

#[test]
fn included_files_come_first_and_the_including_one_wins() {
    let scratch = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = scratch.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    };
    write(
        "site/common.toml",
        "os = \"debian-13\"\npackages = [\"vim\"]\n[[file]]\npath = \"/a\"\nsource = \"banner\"\n",
    );
    let top = write("top.toml", "include = [\"site/common.toml\"]\nos = \"debian-12\"\npackages = [\"-vim\"]\n");
    let recipe = Recipe::read(&top).unwrap();
    assert_eq!(recipe.os.as_deref(), Some("debian-12"));
    let words: Vec<&str> = recipe.packages.iter().map(|item| item.value.0.as_str()).collect();
    assert_eq!(words, ["vim", "-vim"]);
    assert_eq!(recipe.files[0].what, What::Copy(scratch.path().join("site/banner")));
    assert_eq!(recipe.read_from, [scratch.path().join("site/common.toml"), top]);

    let circle = write("circle.toml", "include = \"circle2.toml\"\n");
    write("circle2.toml", "include = \"./circle.toml\"\n");
    let error = Recipe::read(&circle).unwrap_err().to_string();
    assert!(error.contains("circle2.toml' cannot include") && error.contains("would never end"), "{error}");

    for depth in 0..20 {
        write(&format!("deep{depth}.toml"), &format!("include = \"deep{}.toml\"\n", depth + 1));
    }
    let error = Recipe::read(&scratch.path().join("deep0.toml")).unwrap_err().to_string();
    assert!(error.contains("at most 16 times in a row"), "{error}");

    let broken = write("broken.toml", "include = \"bad.toml\"\n");
    write("bad.toml", "\npackges = []\n");
    let error = Recipe::read(&broken).unwrap_err().to_string();
    assert!(error.contains("bad.toml', line 2: unknown field `packges`"), "{error}");
    let missing = write("missing.toml", "include = \"none.toml\"\n");
    let error = Recipe::read(&missing).unwrap_err().to_string();
    assert!(error.contains("missing.toml' cannot include") && error.contains("No such file"), "{error}");
}
