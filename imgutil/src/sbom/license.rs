//! Licences in the words of SPDX. What is not known for certain is not said: an SBOM has `NOASSERTION` for it.

/// Identifiers of SPDX that are common in distributions.
const KNOWN: &[&str] = &[
    "0BSD",
    "AFL-2.1",
    "AGPL-3.0-only",
    "AGPL-3.0-or-later",
    "Apache-1.1",
    "Apache-2.0",
    "Artistic-1.0",
    "Artistic-1.0-Perl",
    "Artistic-2.0",
    "BSD-1-Clause",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSD-4-Clause",
    "BSL-1.0",
    "CC-BY-3.0",
    "CC-BY-4.0",
    "CC-BY-SA-3.0",
    "CC-BY-SA-4.0",
    "CC0-1.0",
    "CDDL-1.0",
    "EPL-1.0",
    "EPL-2.0",
    "FSFAP",
    "FSFUL",
    "FSFULLR",
    "FTL",
    "GFDL-1.1-or-later",
    "GFDL-1.2-or-later",
    "GFDL-1.3-only",
    "GFDL-1.3-or-later",
    "GPL-1.0-only",
    "GPL-1.0-or-later",
    "GPL-2.0-only",
    "GPL-2.0-or-later",
    "GPL-3.0-only",
    "GPL-3.0-or-later",
    "HPND",
    "ICU",
    "IJG",
    "ISC",
    "LGPL-2.0-only",
    "LGPL-2.0-or-later",
    "LGPL-2.1-only",
    "LGPL-2.1-or-later",
    "LGPL-3.0-only",
    "LGPL-3.0-or-later",
    "LPPL-1.3c",
    "Libpng",
    "MIT",
    "MIT-0",
    "MPL-1.1",
    "MPL-2.0",
    "MS-PL",
    "NCSA",
    "OFL-1.1",
    "OLDAP-2.8",
    "OpenSSL",
    "PSF-2.0",
    "PostgreSQL",
    "Python-2.0",
    "Ruby",
    "SISSL",
    "Sleepycat",
    "Unicode-3.0",
    "Unicode-DFS-2016",
    "Unlicense",
    "Vim",
    "W3C",
    "WTFPL",
    "X11",
    "Zlib",
    "bzip2-1.0.6",
    "curl",
    "zlib-acknowledgement",
];

/// Short names of Debian's copyright files (DEP 5) and of older RPM packages that mean one of these.
const NAMES: &[(&str, &str)] = &[
    ("Apache-2", "Apache-2.0"),
    ("ASL 2.0", "Apache-2.0"),
    ("Artistic", "Artistic-1.0-Perl"),
    ("BSD-2-clause", "BSD-2-Clause"),
    ("BSD-3-clause", "BSD-3-Clause"),
    ("BSD-4-clause", "BSD-4-Clause"),
    ("Expat", "MIT"),
    ("GFDL-1.2+", "GFDL-1.2-or-later"),
    ("GFDL-1.3+", "GFDL-1.3-or-later"),
    ("GPL-1+", "GPL-1.0-or-later"),
    ("GPL+", "GPL-1.0-or-later"),
    ("GPL-2", "GPL-2.0-only"),
    ("GPL-2.0", "GPL-2.0-only"),
    ("GPLv2", "GPL-2.0-only"),
    ("GPL-2+", "GPL-2.0-or-later"),
    ("GPL-2.0+", "GPL-2.0-or-later"),
    ("GPLv2+", "GPL-2.0-or-later"),
    ("GPL-3", "GPL-3.0-only"),
    ("GPLv3", "GPL-3.0-only"),
    ("GPL-3+", "GPL-3.0-or-later"),
    ("GPL-3.0+", "GPL-3.0-or-later"),
    ("GPLv3+", "GPL-3.0-or-later"),
    ("LGPL-2", "LGPL-2.0-only"),
    ("LGPLv2", "LGPL-2.0-only"),
    ("LGPL-2+", "LGPL-2.0-or-later"),
    ("LGPLv2+", "LGPL-2.0-or-later"),
    ("LGPL-2.1", "LGPL-2.1-only"),
    ("LGPL-2.1+", "LGPL-2.1-or-later"),
    ("LGPL-3", "LGPL-3.0-only"),
    ("LGPLv3", "LGPL-3.0-only"),
    ("LGPL-3+", "LGPL-3.0-or-later"),
    ("LGPLv3+", "LGPL-3.0-or-later"),
    ("MPL-2", "MPL-2.0"),
    ("MPLv2.0", "MPL-2.0"),
    ("zlib", "Zlib"),
];

fn identifier(name: &str) -> Option<&'static str> {
    KNOWN
        .iter()
        .find(|known| **known == name)
        .copied()
        .or_else(|| NAMES.iter().find(|(alias, _)| *alias == name).map(|(_, id)| *id))
}

/// The expression of an RPM package's licence field; `None` unless every licence in it is known.
pub(super) fn expression(text: &str) -> Option<String> {
    if let Some(known) = identifier(text.trim()) {
        return Some(known.to_owned());
    }
    let spaced = text.replace('(', " ( ").replace(')', " ) ");
    let mut words = Vec::new();
    let (mut depth, mut wants_name) = (0_usize, true);
    for word in spaced.split_whitespace() {
        match word {
            "(" if wants_name => depth += 1,
            ")" if !wants_name => depth = depth.checked_sub(1)?,
            "and" | "or" | "AND" | "OR" if !wants_name => wants_name = true,
            name if wants_name => {
                words.push(identifier(name)?.to_owned());
                wants_name = false;
                continue;
            }
            _ => return None,
        }
        words.push(word.to_uppercase());
    }
    (depth == 0 && !wants_name).then(|| words.join(" ").replace("( ", "(").replace(" )", ")"))
}

/// All licences that the paragraphs of a Debian copyright file name; `None` unless every one is known.
pub(super) fn of_debian<'a>(names: impl Iterator<Item = &'a str>) -> Option<String> {
    let mut found = Vec::new();
    for name in names {
        let expression = expression(&name.replace(',', " "))?;
        let expression = if expression.contains(' ') { format!("({expression})") } else { expression };
        if !found.contains(&expression) {
            found.push(expression);
        }
    }
    (!found.is_empty()).then(|| found.join(" AND "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_is_said_and_nothing_else() {
        for (text, wanted) in [
            ("MIT", Some("MIT")),
            ("GPLv2+", Some("GPL-2.0-or-later")),
            ("GPL-2.0-or-later AND (MIT or BSD-3-Clause)", Some("GPL-2.0-or-later AND (MIT OR BSD-3-Clause)")),
            ("ASL 2.0", Some("Apache-2.0")),
            ("GPLv2+ and Public Domain", None),
            ("MIT and", None),
            ("(MIT", None),
            ("MIT)", None),
            ("and", None),
            ("", None),
        ] {
            assert_eq!(expression(text).as_deref(), wanted, "{text}");
        }
        assert_eq!(of_debian(["GPL-2+", "Expat", "GPL-2+"].into_iter()).as_deref(), Some("GPL-2.0-or-later AND MIT"));
        assert_eq!(of_debian(["Expat or GPL-3"].into_iter()).as_deref(), Some("(MIT OR GPL-3.0-only)"));
        assert_eq!(of_debian(["Expat", "public-domain"].into_iter()), None);
        assert_eq!(of_debian(std::iter::empty()), None);
    }

    #[test]
    fn every_alias_means_a_known_identifier() {
        assert!(NAMES.iter().all(|(_, id)| KNOWN.contains(id)));
    }
}
