//! Entries of a recipe that count only for some architectures, systems or releases.

use serde::de::{MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer};
use serde::{Deserialize, Deserializer};
use std::cmp::Ordering;
use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

/// An entry of a list, with the condition under which it counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item<T> {
    /// The entry.
    pub value: T,
    /// When it counts.
    pub when: When,
}

impl<T> Item<T> {
    /// An entry that always counts.
    pub fn always(value: T) -> Self {
        Self { value, when: When::default() }
    }
}

/// A condition; what is left out is true.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct When {
    arch: Vec<String>,
    os: Vec<String>,
    version: Vec<(Test, String)>,
}

/// How two versions are to compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Test {
    Equal,
    Less,
    AtMost,
    AtLeast,
    Greater,
}

/// What is built, as far as conditions are about it.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// As `debian-12`.
    pub os: &'a str,
    /// The architecture as `uname -m` says it.
    pub machine: &'a str,
    /// The architecture in the distribution's words.
    pub arch: &'a str,
}

impl When {
    /// A condition from its parts as a recipe gives them.
    pub(super) fn new(arch: Vec<String>, os: Vec<String>, version: Option<&str>) -> Result<Self, String> {
        let version =
            version.map_or(Ok(Vec::new()), |text| text.split(',').map(|test| parse_test(test.trim())).collect())?;
        Ok(Self { arch, os, version })
    }

    /// Whether it is true.
    #[must_use]
    pub fn holds(&self, target: Target<'_>) -> bool {
        // A family's name may have a hyphen itself: centos-stream-9.
        let (family, release) = target.os.rsplit_once('-').unwrap_or((target.os, ""));
        (self.arch.is_empty() || self.arch.iter().any(|arch| arch == target.machine || arch == target.arch))
            && (self.os.is_empty() || self.os.iter().any(|os| os == target.os || os == family))
            && self.version.iter().all(|(test, version)| {
                let order = compare(release, version);
                match test {
                    Test::Equal => order == Ordering::Equal,
                    Test::Less => order == Ordering::Less,
                    Test::AtMost => order != Ordering::Greater,
                    Test::AtLeast => order != Ordering::Less,
                    Test::Greater => order == Ordering::Greater,
                }
            })
    }
}

fn parse_test(text: &str) -> Result<(Test, String), String> {
    let tests =
        [("<=", Test::AtMost), (">=", Test::AtLeast), ("<", Test::Less), (">", Test::Greater), ("=", Test::Equal)];
    let found = tests.into_iter().find_map(|(sign, test)| Some((test, text.strip_prefix(sign)?.trim())));
    let (test, version) = found.unwrap_or((Test::Equal, text));
    let number = |part: &str| !part.is_empty() && part.len() < 10 && part.chars().all(|c| c.is_ascii_digit());
    if !version.split('.').all(number) {
        return Err(format!("'{text}' is no version; write it as \"12\", \">=24.04\" or \">=12,<14\""));
    }
    Ok((test, version.to_owned()))
}

/// Compares dotted numbers: 9 < 10, 12 = 12.0.
fn compare(a: &str, b: &str) -> Ordering {
    let numbers = |text: &str| text.split('.').map(|part| part.parse::<u32>().unwrap_or(0)).collect::<Vec<_>>();
    let (mut a, mut b) = (numbers(a), numbers(b));
    let length = a.len().max(b.len());
    a.resize(length, 0);
    b.resize(length, 0);
    a.cmp(&b)
}

/// Entries that are each a string, or a table with `name` or `names` (`command` for commands) and a condition.
pub(super) fn items<'de, D, T>(deserializer: D) -> Result<Vec<Item<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err = String>,
{
    let entries = Vec::<Entry<T>>::deserialize(deserializer)?;
    let flat = entries.into_iter().flat_map(|entry| {
        let when = entry.when;
        entry.values.into_iter().map(move |value| Item { value, when: when.clone() })
    });
    Ok(flat.collect())
}

struct Entry<T> {
    values: Vec<T>,
    when: When,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    #[serde(default, alias = "name", alias = "names", alias = "command", deserialize_with = "strings")]
    entry: Vec<String>,
    #[serde(default, deserialize_with = "strings")]
    arch: Vec<String>,
    #[serde(default, deserialize_with = "strings")]
    os: Vec<String>,
    version: Option<String>,
}

impl<'de, T: FromStr<Err = String>> Deserialize<'de> for Entry<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(EntryVisitor(PhantomData))
    }
}

struct EntryVisitor<T>(PhantomData<T>);

impl<'de, T: FromStr<Err = String>> Visitor<'de> for EntryVisitor<T> {
    type Value = Entry<T>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a string, or a table with 'name' and a condition")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Entry { values: vec![text.parse().map_err(E::custom)?], when: When::default() })
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        let raw = RawEntry::deserialize(MapAccessDeserializer::new(map))?;
        let custom = <A::Error as serde::de::Error>::custom::<String>;
        if raw.entry.is_empty() {
            return Err(custom("an entry needs 'name' or 'names' (a command: 'command')".to_owned()));
        }
        let values = raw.entry.iter().map(|text| text.parse()).collect::<Result<_, _>>().map_err(custom)?;
        let when = When::new(raw.arch, raw.os, raw.version.as_deref()).map_err(custom)?;
        Ok(Entry { values, when })
    }
}

/// A string, or a list of them.
pub(super) fn strings<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct Strings;

    impl<'de> Visitor<'de> for Strings {
        type Value = Vec<String>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("a string or a list of strings")
        }

        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
            Ok(vec![text.to_owned()])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut all = Vec::new();
            while let Some(text) = list.next_element()? {
                all.push(text);
            }
            Ok(all)
        }
    }
    deserializer.deserialize_any(Strings)
}
