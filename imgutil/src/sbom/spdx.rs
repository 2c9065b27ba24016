//! SPDX 2.3 in JSON (spdx.github.io/spdx-spec/v2.3).

use super::database::{Installed, System};
use serde_json::{Value, json};
use std::fmt::Write as _;
use uuid::Uuid;

/// What is described.
pub struct Subject {
    /// Its name.
    pub name: String,
    /// `ID` of os-release(5), for the package URLs; empty if unknown.
    pub distribution: String,
    /// `ID-VERSION_ID`, or empty.
    pub os: String,
    /// Hexadecimal SHA-256 that names an image, and that of its payload; a tree has none.
    pub digest: Option<(String, String)>,
    /// When the document is made, RFC 3339 in UTC without fractions.
    pub created: String,
}

/// The document.
#[must_use]
pub fn document(subject: &Subject, packages: &[Installed]) -> Value {
    const NONE: &str = "NOASSERTION";
    let mut root = json!({
        "SPDXID": "SPDXRef-Image",
        "name": subject.name,
        "downloadLocation": NONE,
        "filesAnalyzed": false,
        "licenseConcluded": NONE,
        "licenseDeclared": NONE,
        "copyrightText": NONE,
        "supplier": NONE,
        "primaryPackagePurpose": "OPERATING-SYSTEM",
    });
    if let Some((digest, payload)) = &subject.digest {
        // The digest names the image, but is not the SHA-256 of the file's bytes: it must not stand among the checksums.
        root["comment"] = json!(format!("Mooring image, digest {digest}; SHA-256 of its payload: {payload}"));
        root["versionInfo"] = json!(digest);
    }
    if !subject.os.is_empty() {
        root["summary"] = json!(subject.os);
    }
    let mut list = vec![root];
    let mut relationships = vec![json!({
        "spdxElementId": "SPDXRef-DOCUMENT",
        "relationshipType": "DESCRIBES",
        "relatedSpdxElement": "SPDXRef-Image",
    })];
    for (number, package) in (1..).zip(packages) {
        let id = format!("SPDXRef-Package-{number}-{}", identifier(&package.name));
        let mut entry = json!({
            "SPDXID": id,
            "name": package.name,
            "versionInfo": package.version,
            "supplier": package.supplier.as_deref().map_or_else(|| NONE.to_owned(), supplier),
            "downloadLocation": NONE,
            "filesAnalyzed": false,
            "licenseConcluded": NONE,
            "licenseDeclared": package.license.as_deref().unwrap_or(NONE),
            "copyrightText": NONE,
            "externalRefs": [{
                "referenceCategory": "PACKAGE-MANAGER",
                "referenceType": "purl",
                "referenceLocator": purl(package, &subject.distribution),
            }],
        });
        if let Some(homepage) = package.homepage.as_deref().filter(|homepage| is_url(homepage)) {
            entry["homepage"] = json!(homepage);
        }
        if let Some(source) = &package.source {
            entry["sourceInfo"] = json!(format!("built from {source}"));
        }
        list.push(entry);
        relationships.push(json!({
            "spdxElementId": "SPDXRef-Image",
            "relationshipType": "CONTAINS",
            "relatedSpdxElement": id,
        }));
    }
    // A document's name space is unique: the digest where there is one, so that one image gives one document.
    let unique = subject.digest.as_ref().map_or_else(|| Uuid::new_v4().to_string(), |(digest, _)| digest.clone());
    json!({
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": subject.name,
        "documentNamespace": format!("https://mooring.example/spdx/{}-{unique}", identifier(&subject.name)),
        "creationInfo": {
            "created": subject.created,
            "creators": [format!("Tool: imgutil-{}", env!("CARGO_PKG_VERSION"))],
        },
        "packages": list,
        "relationships": relationships,
    })
}

/// Letters, digits, `.` and `-`, as identifiers of SPDX are.
fn identifier(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect()
}

/// `Name <address>` as SPDX writes it.
fn supplier(text: &str) -> String {
    let clean: String = text.chars().filter(|c| !c.is_control()).collect();
    let (name, mail) = clean.split_once('<').map_or((clean.as_str(), ""), |(name, mail)| (name, mail));
    let (name, mail) = (name.trim().trim_matches('"').replace(['(', ')'], ""), mail.trim().trim_end_matches('>'));
    // The form has no room for a second address or a name that is none.
    let is_address = mail.contains('@') && !mail.contains(['<', '>', '(', ')', ' ', ',']);
    match (name.is_empty(), is_address) {
        (true, false) => "NOASSERTION".to_owned(),
        (true, true) => format!("Organization: {mail} ({mail})"),
        (false, true) => format!("Organization: {name} ({mail})"),
        (false, false) => format!("Organization: {name}"),
    }
}

fn is_url(text: &str) -> bool {
    let rest = ["https://", "http://", "ftp://"].iter().find_map(|scheme| text.strip_prefix(scheme));
    rest.is_some_and(|rest| {
        rest.starts_with(|c: char| c.is_ascii_alphanumeric())
            && rest.chars().all(|c| c.is_ascii_graphic() && !"<>\"{}|\\^`".contains(c))
    })
}

/// A package URL (github.com/package-url/purl-spec).
fn purl(package: &Installed, distribution: &str) -> String {
    let (kind, namespace) = match package.system {
        System::Deb => ("deb", if distribution.is_empty() { "debian" } else { distribution }),
        System::Rpm => ("rpm", distribution),
    };
    let namespace = if namespace.is_empty() { String::new() } else { format!("{}/", encoded(namespace)) };
    // An RPM's epoch is a qualifier.
    let (version, epoch) = match (package.system, package.version.split_once(':')) {
        (System::Rpm, Some((epoch, version))) => (version, format!("&epoch={}", encoded(epoch))),
        _ => (package.version.as_str(), String::new()),
    };
    let (name, version, arch) = (encoded(&package.name), encoded(version), encoded(&package.arch));
    format!("pkg:{kind}/{namespace}{name}@{version}?arch={arch}{epoch}")
}

/// Percent-encoding of all but what a package URL may hold as it is.
fn encoded(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~:".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suppliers_and_package_urls_are_well_formed() {
        for (text, wanted) in [
            ("Debian OpenSSL Team <pkg-openssl@x.org>", "Organization: Debian OpenSSL Team (pkg-openssl@x.org)"),
            ("\"A (B)\" <a@b>", "Organization: A B (a@b)"),
            ("Fedora Project", "Organization: Fedora Project"),
            ("<a@b>", "Organization: a@b (a@b)"),
            ("", "NOASSERTION"),
        ] {
            assert_eq!(supplier(text), wanted);
        }
        let package = |system, name: &str, version: &str| Installed {
            name: name.into(),
            version: version.into(),
            arch: "amd64".into(),
            system,
            source: None,
            supplier: None,
            license: None,
            homepage: None,
        };
        assert_eq!(
            purl(&package(System::Deb, "g++", "1:2~3+b"), "debian"),
            "pkg:deb/debian/g%2B%2B@1:2~3%2Bb?arch=amd64"
        );
        assert_eq!(
            purl(&package(System::Rpm, "x", "2:1-1.el9"), "rocky"),
            "pkg:rpm/rocky/x@1-1.el9?arch=amd64&epoch=2"
        );
        assert!(is_url("https://a.b/c") && !is_url("see README") && !is_url("https://") && !is_url("https://a b"));
    }
}
