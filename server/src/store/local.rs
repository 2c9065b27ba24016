//! The store of a member that stands alone. One thread applies commands in order and commits as many as wait in one transaction, so
//! that a storm shares its fsyncs.

use super::command::{Command, Outcome};
use super::tables::{self, Snapshot};
use super::{Event, Store, StoreError, apply};
use crate::files::free_space;
use redb::Database;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use tokio::sync::{broadcast, oneshot};
use tokio_util::sync::CancellationToken;

/// Commands that one transaction commits at most.
const BATCH: usize = 256;
/// Commands that may wait.
const QUEUE: usize = 4096;
/// Events a slow watcher may be behind before it has to begin anew.
const EVENTS: usize = 4096;
/// Below this many bytes of free space nothing is written: a database that meets the end of the disk has to be opened anew, and until
/// then a full disk is a refusal, and reads go on.
const RESERVE: u64 = 8 << 20;

type Job = (Command, oneshot::Sender<Result<Outcome, StoreError>>);

/// A store on one disk.
pub struct Local {
    database: Arc<Database>,
    /// Both are taken when it is dropped.
    queue: Option<mpsc::SyncSender<Job>>,
    writer: Option<JoinHandle<()>>,
    events: broadcast::Sender<Event>,
    broken: CancellationToken,
}

impl Drop for Local {
    /// The database is closed when this returns: the thread ends with its queue.
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(writer) = self.writer.take() {
            // A writer that panicked has answered nobody: there is nothing to do for it.
            let _ = writer.join();
        }
    }
}

impl Local {
    /// Opens or makes the database.
    ///
    /// # Errors
    /// It cannot be opened; another process has it open.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let database = Arc::new(Database::create(path)?);
        let transaction = database.begin_write()?;
        tables::create(&transaction)?;
        transaction.commit()?;
        let (queue, jobs) = mpsc::sync_channel(QUEUE);
        let (events, _) = broadcast::channel(EVENTS);
        let broken = CancellationToken::new();
        let writer = Writer {
            database: database.clone(),
            disk: path.parent().unwrap_or(path).to_owned(),
            events: events.clone(),
            broken: broken.clone(),
        };
        let thread = std::thread::Builder::new().name("store".into());
        let writer = thread.spawn(move || writer.run(&jobs)).map_err(|_| StoreError::Closed)?;
        Ok(Self { database, queue: Some(queue), writer: Some(writer), events, broken })
    }

    /// Returns once the database has failed in a way that only opening it anew mends.
    pub async fn failed(&self) {
        self.broken.cancelled().await;
    }
}

impl Store for Local {
    async fn propose(&self, command: Command) -> Result<Outcome, StoreError> {
        let (answer, answered) = oneshot::channel();
        let queue = self.queue.as_ref().ok_or(StoreError::Closed)?;
        queue.try_send((command, answer)).map_err(|_| StoreError::Closed)?;
        answered.await.map_err(|_| StoreError::Closed)?
    }

    fn snapshot(&self) -> Result<Snapshot, StoreError> {
        Snapshot::new(&self.database)
    }

    fn watch(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }
}

struct Writer {
    database: Arc<Database>,
    disk: PathBuf,
    events: broadcast::Sender<Event>,
    broken: CancellationToken,
}

impl Writer {
    fn run(&self, jobs: &mpsc::Receiver<Job>) {
        while let Ok(first) = jobs.recv() {
            let mut batch = vec![first];
            while batch.len() < BATCH {
                let Ok(job) = jobs.try_recv() else { break };
                batch.push(job);
            }
            match free_space(&self.disk) {
                Ok(free) if free < RESERVE => {
                    for (_, answer) in batch {
                        let _ = answer.send(Err(StoreError::Full(free >> 20)));
                    }
                }
                _ => self.apply(batch),
            }
        }
    }

    fn apply(&self, batch: Vec<Job>) {
        let (commands, answers): (Vec<Command>, Vec<_>) = batch.into_iter().unzip();
        match self.commit(commands) {
            Ok((outcomes, events)) => {
                for (answer, outcome) in answers.into_iter().zip(outcomes) {
                    // Nobody waits any more: the change is durable all the same.
                    let _ = answer.send(Ok(outcome));
                }
                for event in events {
                    // No watcher is no error.
                    let _ = self.events.send(event);
                }
            }
            Err(error) => {
                tracing::error!("a transaction failed: {error}");
                if matches!(error, StoreError::Database(_)) {
                    self.broken.cancel();
                }
                for answer in answers {
                    let _ = answer.send(Err(StoreError::Closed));
                }
            }
        }
    }

    /// Applies commands in one transaction. redb syncs the file before `commit` returns.
    fn commit(&self, commands: Vec<Command>) -> Result<(Vec<Outcome>, Vec<Event>), StoreError> {
        let transaction = self.database.begin_write()?;
        let write = tables::Write::new(&transaction);
        let outcomes =
            commands.into_iter().map(|command| apply::apply(&write, command)).collect::<Result<Vec<_>, _>>()?;
        let events = write.into_events();
        transaction.commit()?;
        Ok((outcomes, events))
    }
}
