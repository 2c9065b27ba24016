//! A world whose time, order of tasks and chance come from one seed: the same seed gives the same run, to the last step.

use moor_tether::reader::world::{Boxed, World};
use std::collections::{BTreeMap, HashMap};
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

/// xorshift64*: enough to spread tests, and nothing else.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        // Neighbouring seeds must not begin alike (splitmix64), and nothing comes after 0.
        let mut z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        Self((z ^ (z >> 31)) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Less than `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end.max(1)
    }

    pub(crate) fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }
}

/// The world. Clones are the same one.
#[derive(Clone)]
pub(crate) struct Sim(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Apart, because wakers are called from everywhere.
    ready: Arc<Mutex<Vec<Arc<Id>>>>,
}

struct State {
    now: Duration,
    random: Random,
    tasks: HashMap<u64, Boxed<'static, ()>>,
    last_task: u64,
    timers: BTreeMap<(Duration, u64), Waker>,
    last_timer: u64,
}

/// A task, as its wakers know it.
struct Id {
    number: u64,
    is_queued: AtomicBool,
    ready: Arc<Mutex<Vec<Arc<Id>>>>,
}

impl Wake for Id {
    fn wake(self: Arc<Self>) {
        if !self.is_queued.swap(true, Ordering::Relaxed) {
            lock(&self.ready).push(self.clone());
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sim {
    pub(crate) fn new(seed: u64) -> Self {
        let state = State {
            now: Duration::ZERO,
            random: Random::new(seed),
            tasks: HashMap::new(),
            last_task: 0,
            timers: BTreeMap::new(),
            last_timer: 0,
        };
        Self(Arc::new(Shared { state: Mutex::new(state), ready: Arc::default() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0.state)
    }

    /// Runs `main` and all tasks until `main` is done, or `limit` is over in this world: then `None`, and so when nothing is left that
    /// could ever happen.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        limit: Duration,
        main: impl Future<Output = T> + Send + 'static,
    ) -> Option<T> {
        let result = Arc::new(Mutex::new(None));
        let out = result.clone();
        self.spawn(Box::pin(async move {
            let value = main.await;
            *lock(&out) = Some(value);
        }));
        loop {
            if let Some(value) = lock(&result).take() {
                // What is left refers to this world, and this world to it.
                let tasks = std::mem::take(&mut self.state().tasks);
                drop(tasks);
                return Some(value);
            }
            if !self.step() && !self.advance(limit) {
                return None;
            }
        }
    }

    /// One step of a task that is ready, any of them; `false`: none is.
    fn step(&self) -> bool {
        let id = {
            let mut ready = lock(&self.0.ready);
            if ready.is_empty() {
                return false;
            }
            let at = self.state().random.below(ready.len() as u64);
            ready.swap_remove(usize::try_from(at).unwrap())
        };
        id.is_queued.store(false, Ordering::Relaxed);
        let task = self.state().tasks.remove(&id.number);
        if let Some(mut task) = task {
            let waker = Waker::from(id.clone());
            if task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
                self.state().tasks.insert(id.number, task);
            }
        }
        true
    }

    /// Goes to the next timer, if there is one before `limit`.
    fn advance(&self, limit: Duration) -> bool {
        let waker = {
            let mut state = self.state();
            let Some((&(at, number), _)) = state.timers.first_key_value() else { return false };
            if at > limit {
                return false;
            }
            state.now = at;
            state.timers.remove(&(at, number))
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }
}

impl World for Sim {
    fn now(&self) -> Duration {
        self.state().now
    }

    fn sleep(&self, time: Duration) -> Boxed<'static, ()> {
        let mut timer = {
            let mut state = self.state();
            state.last_timer += 1;
            Timer { sim: self.clone(), key: (state.now + time, state.last_timer) }
        };
        Box::pin(poll_fn(move |context| timer.poll(context)))
    }

    fn spawn(&self, task: Boxed<'static, ()>) {
        let number = {
            let mut state = self.state();
            state.last_task += 1;
            let number = state.last_task;
            state.tasks.insert(number, task);
            number
        };
        Arc::new(Id { number, is_queued: AtomicBool::new(false), ready: self.0.ready.clone() }).wake();
    }

    fn random(&self) -> u64 {
        self.state().random.next()
    }
}

struct Timer {
    sim: Sim,
    key: (Duration, u64),
}

impl Timer {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let mut state = self.sim.state();
        if state.now >= self.key.0 {
            return Poll::Ready(());
        }
        state.timers.insert(self.key, context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        let waker = self.sim.state().timers.remove(&self.key);
        drop(waker);
    }
}
