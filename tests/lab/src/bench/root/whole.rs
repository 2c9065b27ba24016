//! All files of a tree, once cold and then from memory.

use super::super::mounts::Kind;
use super::super::pairs::median;
use super::super::{Bar, PAIRS, Paired, Row, Table, pairs, reads};
use super::{FEW, FILES, Link, Mounted, PEERS};

/// Seconds after which a peer need not read more files.
const ENOUGH: u64 = 15;

impl Link<'_> {
    /// Seconds for all files, from what was read in the time that there is.
    fn seconds(mounted: &Mounted) -> anyhow::Result<(f64, String)> {
        let found = reads::all((mounted.tree.path(), mounted.remote.as_ref()), ENOUGH)?;
        anyhow::ensure!(found.errors == 0, "{} of {} files were in error", found.errors, found.errors + found.files);
        anyhow::ensure!(found.files > 0, "no file was read");
        let note = if found.files < FILES {
            format!("from {} files in {:.0} s", found.files, found.seconds)
        } else {
            String::new()
        };
        Ok((found.seconds * f64::from(FILES) / f64::from(found.files), note))
    }

    /// `find | xargs cat` of everything: cold beside the peers, warm beside the local file.
    pub(super) fn all_files(&self, table: &mut Table) -> anyhow::Result<()> {
        let row = self.row(&format!("find | xargs cat of {FILES} files"));
        for kind in PEERS {
            let ours = Self::seconds(&self.fresh(Some(Kind::Ours), "files")?)?.0;
            match self.fresh(Some(kind), "files").and_then(|mounted| Self::seconds(&mounted)) {
                Ok((peer, note)) => {
                    let figures = Paired { ours: vec![ours], peer: vec![peer] };
                    table.rows.push(Row::paired(&row, "s", kind.name(), &figures, Bar::None).noted(&note));
                }
                Err(error) => {
                    let why = format!("{error:#}");
                    table.rows.push(Row::without_peer(&row, "s", kind.name(), Some(ours), Bar::None, &why));
                }
            }
        }
        let mut figures = Paired { ours: Vec::new(), peer: Vec::new() };
        for round in 0..PAIRS {
            let [ours, peer] = self.in_memory(round % 2 == 1)?;
            figures.ours.push(ours);
            figures.peer.push(peer);
        }
        table.rows.push(Row::paired(
            &self.row("the same once more, in memory: how often in a second"),
            "1/s",
            "the local file",
            &figures,
            Bar::AtLeast(0.9),
        ));
        Ok(())
    }

    /// How often in a second all files can be read of ours and of the local file once they are in memory, where none is asked any more. Both are
    /// mounted anew: where in memory the kernel has laid what it read makes some percent, and is drawn once for each mount.
    fn in_memory(&self, is_local_first: bool) -> anyhow::Result<[f64; 2]> {
        let kinds = if is_local_first { [None, Some(Kind::Ours)] } else { [Some(Kind::Ours), None] };
        let mut mounted = Vec::new();
        for kind in kinds {
            mounted.push(self.fresh(kind, "files")?);
        }
        for tree in &mounted {
            Self::seconds(tree)?;
        }
        let rate = |tree: &Mounted| Ok(1.0 / Self::seconds(tree)?.0);
        let rates = pairs(FEW, || rate(&mounted[0]), || rate(&mounted[1]))?;
        for remote in mounted.iter().filter_map(|tree| tree.remote.as_ref()) {
            self.note_memory(remote)?;
        }
        let middles = [median(&rates.0), median(&rates.1)];
        Ok(if is_local_first { [middles[1], middles[0]] } else { middles })
    }
}
