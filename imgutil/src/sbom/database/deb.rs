//! dpkg's database: `/var/lib/dpkg/status`, and `status.d` of images without dpkg (deb-control(5): paragraphs of fields).

use super::{DATABASE, Files, Installed, System};
use crate::sbom::license;
use anyhow::Result;

/// Installed packages.
pub(super) fn installed(files: &dyn Files) -> Result<Vec<Installed>> {
    let mut packages = Vec::new();
    let status = files.read("var/lib/dpkg/status", DATABASE)?.unwrap_or_default();
    parse(&String::from_utf8_lossy(&status), true, &mut packages);
    for name in files.list("var/lib/dpkg/status.d")?.iter().filter(|name| !name.ends_with(".md5sums")) {
        let text = files.read(&format!("var/lib/dpkg/status.d/{name}"), DATABASE)?.unwrap_or_default();
        parse(&String::from_utf8_lossy(&text), false, &mut packages);
    }
    for package in &mut packages {
        package.license = copyright(files, &package.name)?;
    }
    Ok(packages)
}

fn parse(text: &str, with_status: bool, packages: &mut Vec<Installed>) {
    for paragraph in text.split("\n\n") {
        let field = |name: &str| {
            let value = paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?.trim();
            (!value.is_empty()).then(|| value.to_owned())
        };
        let is_installed = !with_status || field("Status").is_some_and(|status| status.ends_with(" installed"));
        if is_installed
            && let (Some(name), Some(version), Some(arch)) = (field("Package"), field("Version"), field("Architecture"))
        {
            packages.push(Installed {
                name,
                version,
                arch,
                system: System::Deb,
                source: field("Source"),
                supplier: field("Maintainer"),
                license: None,
                homepage: field("Homepage"),
            });
        }
    }
}

/// The licences that a package's copyright file names, if it is in the form that machines can read (DEP 5) and all are known.
fn copyright(files: &dyn Files, name: &str) -> Result<Option<String>> {
    const LIMIT: u64 = 4 << 20;
    let Some(bytes) = files.read(&format!("usr/share/doc/{name}/copyright"), LIMIT)? else { return Ok(None) };
    let text = String::from_utf8_lossy(&bytes);
    if !text.lines().take(5).any(|line| line.starts_with("Format:") && line.contains("copyright-format")) {
        return Ok(None);
    }
    let names = text.lines().filter_map(|line| line.strip_prefix("License:")).map(str::trim);
    Ok(license::of_debian(names.filter(|name| !name.is_empty())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_installed_packages_are_listed() {
        let text = "Package: dpkg\nStatus: install ok installed\nVersion: 1.21.22\nArchitecture: amd64\nDescription: x\n y\n\
            Maintainer: Dpkg Developers <debian-dpkg@lists.debian.org>\n\n\
            Package: gone\nStatus: deinstall ok config-files\nVersion: 1\nArchitecture: all\n\n\
            Package: base-files\nStatus: install ok installed\nVersion: 12\nArchitecture: amd64\nSource: base (12.1)\n";
        let mut packages = Vec::new();
        parse(text, true, &mut packages);
        assert_eq!(packages.iter().map(|package| package.name.as_str()).collect::<Vec<_>>(), ["dpkg", "base-files"]);
        assert_eq!(packages[0].version, "1.21.22");
        assert_eq!(packages[0].supplier.as_deref(), Some("Dpkg Developers <debian-dpkg@lists.debian.org>"));
        assert_eq!(packages[1].source.as_deref(), Some("base (12.1)"));
    }
}
