//! The state as metrics of Prometheus, in its text format: names by its conventions (base units, `_total` for what only grows).

use crate::reader::{MemberStatus, Standing};
use crate::state::State;
use std::fmt;

/// The metrics of a state, one family after the other.
pub struct Text<'a>(pub &'a State);

/// A value of a label: what the format wants escaped is.
struct Label<'a>(&'a str);

impl fmt::Display for Label<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character {
                '\\' => f.write_str("\\\\")?,
                '"' => f.write_str("\\\"")?,
                '\n' => f.write_str("\\n")?,
                other => write!(f, "{other}")?,
            }
        }
        Ok(())
    }
}

fn head(f: &mut fmt::Formatter<'_>, name: &str, kind: &str, help: &str) -> fmt::Result {
    writeln!(f, "# HELP moor_tether_{name} {help}\n# TYPE moor_tether_{name} {kind}")
}

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0;
        let (digest, mode) = (Label(&state.digest), state.mode.as_str());
        head(f, "info", "gauge", "The image that the root is made of, and how it is read.")?;
        writeln!(f, "moor_tether_info{{digest=\"{digest}\",mode=\"{mode}\"}} 1")?;
        let singles = [
            ("up", "gauge", "Whether the image is served, or needs nobody to serve it.", u64::from(state.is_up())),
            ("image_size_bytes", "gauge", "Size of the sealed image.", state.image_size),
            ("received_bytes_total", "counter", "Bytes of answers received from all servers.", state.bytes_fetched),
            ("received_chunks_total", "counter", "Whole chunks received.", state.chunks_fetched),
            ("verified_chunks_total", "counter", "Chunks received that verified.", state.chunks_verified),
            (
                "prefetched_chunks_total",
                "counter",
                "Chunks that came because earlier boots read them.",
                state.prefetched,
            ),
            ("cache_size_bytes", "gauge", "Bytes of verified chunks in memory.", state.cache_bytes),
            (
                "cache_limit_bytes",
                "gauge",
                "Bytes that they may take: less while the machine is short of memory.",
                state.cache_limit,
            ),
            ("hedges_total", "counter", "Requests that were sent to a second server too.", state.hedges),
            ("hedges_won_total", "counter", "Of those, the ones that the second answered first.", state.hedges_won),
        ];
        for (name, kind, help, value) in singles {
            head(f, name, kind, help)?;
            writeln!(f, "moor_tether_{name} {value}")?;
        }
        self.disk(f)?;
        self.servers(f)
    }
}

/// A figure of a server.
type Count = fn(&MemberStatus) -> u64;

impl Text<'_> {
    fn disk(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(disk) = &self.0.disk else { return Ok(()) };
        for (name, kind, help, value) in [
            ("disk_cache_up", "gauge", "Whether the disk cache is used.", u64::from(disk.error.is_none())),
            ("disk_cache_slots", "gauge", "Chunks that fit into the disk cache.", disk.slots),
            ("disk_cache_chunks", "gauge", "Chunks in the disk cache.", disk.held),
            ("disk_cache_hits_total", "counter", "Chunks that came from the disk cache.", disk.hits),
            ("disk_cache_bad_total", "counter", "Chunks in the disk cache that did not verify.", disk.bad),
            ("disk_cache_late_total", "counter", "Reads that the disk cache kept waiting.", disk.late),
        ] {
            head(f, name, kind, help)?;
            writeln!(f, "moor_tether_{name} {value}")?;
        }
        Ok(())
    }

    fn servers(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let members = &self.0.members;
        head(f, "server_up", "gauge", "Whether the server is asked: it is good, or slow and the only one.")?;
        for member in members {
            let up = u8::from(matches!(member.state, Standing::Good | Standing::Slow));
            writeln!(f, "moor_tether_server_up{{url=\"{}\"}} {up}", Label(&member.url))?;
        }
        head(f, "server_excluded", "gauge", "Whether the server served wrong bytes twice.")?;
        for member in members {
            let excluded = u8::from(member.state == Standing::Excluded);
            writeln!(f, "moor_tether_server_excluded{{url=\"{}\"}} {excluded}", Label(&member.url))?;
        }
        let counters: [(&str, &str, Count); 3] = [
            ("server_received_bytes_total", "Bytes of answers received from the server.", |member| member.bytes),
            ("server_requests_total", "Requests sent to the server.", |member| member.requests),
            ("server_faults_total", "How often the server failed.", |member| member.faults),
        ];
        for (name, help, value) in counters {
            head(f, name, "counter", help)?;
            for member in members {
                writeln!(f, "moor_tether_{name}{{url=\"{}\"}} {}", Label(&member.url), value(member))?;
            }
        }
        head(f, "server_latency_seconds", "gauge", "Smoothed time to the first chunk of the server's answers.")?;
        for member in members {
            let (seconds, micros) = (member.latency_us / 1_000_000, member.latency_us % 1_000_000);
            writeln!(f, "moor_tether_server_latency_seconds{{url=\"{}\"}} {seconds}.{micros:06}", Label(&member.url))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_has_its_family_and_labels_are_escaped() {
        let state = r#"{"pid":1,"digest":"ab","image_size":9,"bytes_fetched":7,"chunks_fetched":1,"chunks_verified":1,"cache_bytes":3,
            "disk":{"path":"/x","slots":4,"held":2,"hits":1,"bad":0},
            "members":[{"url":"https://h/\"\\x","bytes":7,"requests":2,"faults":1,"state":"excluded","latency_us":1002003}]}"#;
        let state: State = serde_json::from_str(state).unwrap();
        let text = Text(&state).to_string();
        let mut family = String::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                family = rest.split_once(' ').unwrap().0.to_owned();
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert_eq!(name, family);
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            } else {
                assert!(line.split(['{', ' ']).next() == Some(&family), "{line} is not of {family}");
                let value = line.rsplit_once(' ').unwrap().1;
                assert!(value.parse::<f64>().is_ok(), "{line}");
            }
        }
        for line in [
            r#"moor_tether_server_latency_seconds{url="https://h/\"\\x"} 1.002003"#,
            "moor_tether_received_bytes_total 7",
            "moor_tether_disk_cache_chunks 2",
            r#"moor_tether_server_excluded{url="https://h/\"\\x"} 1"#,
            r#"moor_tether_info{digest="ab",mode="tethered"} 1"#,
        ] {
            assert!(text.lines().any(|have| have == line), "'{line}' is not in:\n{text}");
        }
    }
}
