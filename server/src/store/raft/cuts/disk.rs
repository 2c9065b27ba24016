//! A machine's disk whose power can be cut: of what was written and not synced, each sector is on it afterwards or not, whichever
//! was written first.

use redb::StorageBackend;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

/// What a disk writes whole or not at all, in bytes.
const SECTOR: usize = 512;

/// A change that is not known to have reached the disk.
#[derive(Debug, Clone)]
enum Pending {
    Write(usize, Vec<u8>),
    Length(usize),
}

/// A file: as its user sees it, and as it is on the disk for certain.
#[derive(Debug, Clone, Default)]
struct File {
    seen: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Pending>,
}

fn write(content: &mut Vec<u8>, offset: usize, data: &[u8]) {
    let end = offset + data.len();
    if content.len() < end {
        content.resize(end, 0);
    }
    content[offset..end].copy_from_slice(data);
}

impl File {
    fn sync(&mut self) {
        for change in self.pending.drain(..) {
            match change {
                Pending::Write(offset, data) => write(&mut self.durable, offset, &data),
                Pending::Length(length) => self.durable.resize(length, 0),
            }
        }
    }

    /// What is on the disk when the power is back.
    fn after_cut(mut self, random: &mut fastrand::Rng) -> Vec<u8> {
        random.shuffle(&mut self.pending);
        // Now and then all of it has got there, or nothing.
        let chance = *random.choice(&[0.0, 0.2, 0.5, 0.8, 1.0]).unwrap_or(&0.5);
        for change in self.pending {
            match change {
                Pending::Length(length) if random.f64() < chance => self.durable.resize(length, 0),
                Pending::Length(_) => {}
                Pending::Write(offset, data) => {
                    let mut at = 0;
                    while at < data.len() {
                        let end = (((offset + at) / SECTOR + 1) * SECTOR - offset).min(data.len());
                        if random.f64() < chance {
                            write(&mut self.durable, offset + at, &data[at..end]);
                        }
                        at = end;
                    }
                }
            }
        }
        self.durable
    }
}

#[derive(Debug)]
struct State {
    files: Vec<File>,
    /// Changes and syncs until the power goes; none: it stays.
    left: Option<u64>,
    /// Whether syncing does what it says.
    honest: bool,
}

/// The disk. Clones are the same one.
#[derive(Debug, Clone)]
pub(super) struct Disk(Arc<Mutex<State>>);

impl Disk {
    /// A disk with these files. The power goes after `left` changes and syncs.
    pub(super) fn new(files: Vec<Vec<u8>>, left: Option<u64>, honest: bool) -> Self {
        let files = files.into_iter().map(|seen| File { durable: seen.clone(), seen, pending: Vec::new() }).collect();
        Self(Arc::new(Mutex::new(State { files, left, honest })))
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// One of its files.
    pub(super) fn file(&self, file: usize) -> Handle {
        Handle { disk: self.clone(), file }
    }

    /// Cuts the power, if it is not gone yet: what the files are afterwards.
    pub(super) fn cut(&self, random: &mut fastrand::Rng) -> Vec<Vec<u8>> {
        let files = self.with(|state| {
            state.left = Some(0);
            std::mem::take(&mut state.files)
        });
        files.into_iter().map(|file| file.after_cut(random)).collect()
    }

    /// Whether the power is gone.
    pub(super) fn is_dark(&self) -> bool {
        self.with(|state| state.left == Some(0))
    }
}

/// A file as redb's storage.
#[derive(Debug)]
pub(super) struct Handle {
    disk: Disk,
    file: usize,
}

impl Handle {
    fn with<T>(&self, is_step: bool, work: impl FnOnce(&mut File, bool) -> io::Result<T>) -> io::Result<T> {
        self.disk.with(|state| {
            let gone = || io::Error::other("the power is gone");
            if state.left == Some(0) {
                return Err(gone());
            }
            let done = work(state.files.get_mut(self.file).ok_or_else(gone)?, state.honest)?;
            if is_step && let Some(left) = &mut state.left {
                *left -= 1;
                // It is on its way to the disk, and nobody is told that it got there.
                if *left == 0 {
                    return Err(gone());
                }
            }
            Ok(done)
        })
    }
}

fn place(offset: u64) -> io::Result<usize> {
    usize::try_from(offset).map_err(io::Error::other)
}

impl StorageBackend for Handle {
    fn len(&self) -> io::Result<u64> {
        self.with(false, |file, _| Ok(file.seen.len() as u64))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let start = place(offset)?;
        self.with(false, |file, _| {
            let part = file.seen.get(start..start + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            out.copy_from_slice(part);
            Ok(())
        })
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let length = place(length)?;
        self.with(true, |file, _| {
            file.seen.resize(length, 0);
            file.pending.push(Pending::Length(length));
            Ok(())
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        // A cut in the middle of a sync is one before it: some of what is pending gets there.
        self.with(true, |_, _| Ok(()))?;
        self.with(false, |file, honest| {
            if honest {
                file.sync();
            }
            Ok(())
        })
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let offset = place(offset)?;
        self.with(true, |file, _| {
            write(&mut file.seen, offset, data);
            file.pending.push(Pending::Write(offset, data.to_vec()));
            Ok(())
        })
    }
}
