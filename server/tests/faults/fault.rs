//! What may happen to members, and how it ends.

use crate::MEMBERS;
use crate::cluster::Cluster;
use nix::sys::signal::Signal;

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
    /// These two do not reach each other; the third reaches both.
    Part(usize, usize),
    /// All that run are killed at once.
    KillAll,
}

impl Fault {
    /// The leader is hit as often as the two others together.
    pub(crate) fn draw(random: &mut fastrand::Rng, leader: Option<usize>) -> Self {
        let at = leader.filter(|_| random.bool()).unwrap_or_else(|| random.usize(0..MEMBERS));
        match random.u8(0..8) {
            0 => Self::Kill(at),
            1 => Self::Restart(at),
            2 => Self::Pause(at),
            3 => Self::Isolate(at),
            4 => Self::Mute(at),
            5 => Self::Deafen(at),
            6 => Self::Part(at, (at + random.usize(1..MEMBERS)) % MEMBERS),
            _ => Self::KillAll,
        }
    }

    pub(crate) fn begin(self, cluster: &mut Cluster) -> anyhow::Result<()> {
        let others = |at| (0..MEMBERS).filter(move |other| *other != at);
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
            Self::KillAll => (0..MEMBERS).for_each(|at| cluster.kill(at)),
        }
        Ok(())
    }

    pub(crate) fn end(self, cluster: &mut Cluster) -> anyhow::Result<()> {
        match self {
            Self::Kill(at) => cluster.start(at),
            Self::Restart(_) => Ok(()),
            Self::Pause(at) => cluster.signal(at, Signal::SIGCONT),
            Self::KillAll => (0..MEMBERS).try_for_each(|at| cluster.start(at)),
            Self::Isolate(_) | Self::Mute(_) | Self::Deafen(_) | Self::Part(..) => cluster.net.heal(),
        }
    }
}
