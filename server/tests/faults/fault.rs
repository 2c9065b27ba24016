//! What may happen to members, and how it ends.

use crate::VOTERS;
use crate::cluster::Cluster;
use nix::sys::signal::Signal;
use std::time::Duration;

/// How wrong clocks are, in seconds: certificates that are good to one are not to the other.
const STEPS: [i64; 6] = [-700 * 86_400, -3600, -2, 2, 3600, 400 * 86_400];

#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    Kill(usize),
    Restart(usize),
    Pause(usize),
    /// Nothing reaches it, and nothing comes from it.
    Isolate(usize),
    /// It hears the others, and they do not hear it.
    Mute(usize),
    /// They hear it, and it does not hear them.
    Deafen(usize),
    /// These two do not reach each other; the others reach both.
    Part(usize, usize),
    /// All that run are killed at once.
    KillAll,
    /// All that vote are killed: whoever does not is alone. All of etcd vote.
    Orphan,
    /// Every sync takes longer.
    Slow(usize, Duration),
    /// Its disk is full: it ends.
    Full(usize),
    /// Its clock is wrong by so many seconds.
    Clock(usize, i64),
    /// The same, and it is started with that clock.
    StartWithClock(usize, i64),
    /// It votes no more, and is killed. It votes again when it is back. Of etcd it is removed, and comes back as a learner that is given a vote.
    Demote(usize),
    /// It is ended, and started as one of the newer release. Not drawn: [`UPGRADE`] has its order.
    Upgrade(usize),
    /// It goes back to the earlier release.
    GoBack(usize),
}

/// A rolling upgrade. One member goes back once, which it may as long as the level has not risen. Number 3 has no vote, and counts all the same.
pub(crate) const UPGRADE: [Fault; 6] =
    [Fault::Upgrade(2), Fault::GoBack(2), Fault::Upgrade(0), Fault::Upgrade(2), Fault::Upgrade(3), Fault::Upgrade(1)];

impl Fault {
    /// The leader is hit as often as all others together.
    pub(crate) fn draw(random: &mut fastrand::Rng, cluster: &Cluster, leader: Option<usize>) -> Self {
        let count = cluster.count();
        let at = leader.filter(|_| random.bool()).unwrap_or_else(|| random.usize(0..count));
        let step = STEPS[random.usize(0..STEPS.len())];
        match random.u8(0..14) {
            0 => Self::Kill(at),
            1 => Self::Restart(at),
            2 => Self::Pause(at),
            3 => Self::Isolate(at),
            4 => Self::Mute(at),
            5 => Self::Deafen(at),
            6 => Self::Part(at, (at + random.usize(1..count)) % count),
            7 => Self::KillAll,
            8 => Self::Orphan,
            9 => Self::Slow(at, Duration::from_millis(random.u64(50..1500))),
            10 => Self::Full(at),
            11 => Self::Clock(at, step),
            12 => Self::StartWithClock(at, step),
            _ => Self::Demote(at % VOTERS),
        }
    }

    /// Whether a majority of those that vote is well all the time.
    pub(crate) fn leaves_a_majority(self) -> bool {
        !matches!(self, Self::KillAll | Self::Orphan)
    }

    /// Whom it kills, if one.
    pub(crate) fn kills(self) -> Option<usize> {
        if let Self::Kill(at) = self { Some(at) } else { None }
    }

    pub(crate) async fn begin(self, cluster: &mut Cluster) -> anyhow::Result<()> {
        let count = cluster.count();
        let others = |at| (0..count).filter(move |other| *other != at);
        match self {
            Self::Kill(at) => cluster.kill(at),
            Self::Restart(at) => {
                cluster.kill(at);
                cluster.start(at)?;
            }
            Self::Pause(at) => cluster.signal(at, Signal::SIGSTOP)?,
            Self::Isolate(at) => {
                for other in others(at) {
                    cluster.net.cut(at, other)?;
                    cluster.net.cut(other, at)?;
                }
            }
            Self::Mute(at) => others(at).try_for_each(|other| cluster.net.cut(at, other))?,
            Self::Deafen(at) => others(at).try_for_each(|other| cluster.net.cut(other, at))?,
            Self::Part(one, other) => {
                cluster.net.cut(one, other)?;
                cluster.net.cut(other, one)?;
            }
            Self::KillAll => (0..count).for_each(|at| cluster.kill(at)),
            Self::Orphan => (0..VOTERS).for_each(|at| cluster.kill(at)),
            Self::Slow(at, by) => cluster.orders(at).slow(by)?,
            Self::Full(at) => cluster.fill(at)?,
            Self::Clock(at, by) => cluster.orders(at).clock(by)?,
            Self::StartWithClock(at, by) => {
                cluster.kill(at);
                cluster.orders(at).clock(by)?;
                cluster.start(at)?;
            }
            Self::Demote(at) => cluster.demote(at).await?,
            Self::Upgrade(at) => cluster.upgrade(at, false)?,
            Self::GoBack(at) => cluster.upgrade(at, true)?,
        }
        Ok(())
    }

    pub(crate) async fn end(self, cluster: &mut Cluster) -> anyhow::Result<()> {
        match self {
            Self::Kill(at) => cluster.start(at),
            Self::Restart(_) | Self::Upgrade(_) | Self::GoBack(_) => Ok(()),
            Self::Pause(at) => cluster.signal(at, Signal::SIGCONT),
            Self::KillAll => cluster.start_all(0..cluster.count()),
            Self::Orphan => cluster.start_all(0..VOTERS),
            Self::Isolate(_) | Self::Mute(_) | Self::Deafen(_) | Self::Part(..) => cluster.net.heal(),
            Self::Slow(at, _) => Ok(cluster.orders(at).slow(Duration::ZERO)?),
            Self::Full(at) => cluster.clear(at),
            Self::Clock(at, _) | Self::StartWithClock(at, _) => Ok(cluster.orders(at).clock(0)?),
            Self::Demote(at) => cluster.promote(at).await,
        }
    }
}
