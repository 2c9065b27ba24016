//! A tree from a container image instead of a distribution's packages: its layers, then what a recipe wants besides, and at last
//! everything out that must differ from node to node.
//!
//! An image comes from anywhere: its files are reached through [`Tree`], which nothing leads out of, and its programs run confined
//! ([`super::inside`]).

use super::backend::{self, Context};
use super::plan::Plan;
use super::tools::Tools;
use super::tree::Tree;
use super::workdir::WorkDir;
use super::{BuildError, Built, Event, FromImage, Options, epoch, finish, lay, os, stage};
use crate::exec::{ASK_FOR_THE_END, Machine, SignalWatch};
use crate::oci::{Image, Limits, OciError};
use nix::sys::signal::Signal;
use rustix::fs::{Mode, OFlags};
use std::os::fd::AsFd as _;
use std::time::Instant;

/// Where packages of Debian ask whether they may start a service. Many images say no for good.
const NO_SERVICES: &str = "/usr/sbin/policy-rc.d";

/// Makes a tree of a container image. It appears under its name when it is complete; whatever fails or ends the build before,
/// nothing is left of it.
pub(super) fn build(
    options: &Options,
    from: &FromImage,
    progress: &mut (dyn FnMut(Event<'_>) + Send),
    signals: Option<&SignalWatch>,
) -> Result<Built, BuildError> {
    let started = Instant::now();
    let machine = options.recipe.arch.as_deref().map_or_else(|| Ok(Machine::of_the_host()), Machine::named)?;
    if !from.as_it_is {
        // The image's own programs will be run: before its layers are unpacked, which may take minutes.
        machine.runner()?;
    }
    let image = Image::open(&from.source, machine.name)?;
    let work = WorkDir::create(&options.tree)?;
    unpack(&image, &work, progress, signals)?;
    let tree = Tree::open(&work.root())?;
    let release = ["/etc/os-release", "/usr/lib/os-release"].map(|path| tree.read_text(path).unwrap_or_default());
    let release = release.into_iter().find(|text| !text.is_empty()).unwrap_or_default();

    let (os, finished) = if from.as_it_is {
        progress(Event::Stage("taking out what must differ from node to node"));
        let taken_out = finish::make_impersonal(&tree, &work.root(), &[])?;
        if let Some(seconds) = options.epoch {
            epoch::apply(&tree, &work.root(), seconds)?;
        }
        (os::said_by(&release).0, finish::Finished { kernels: Vec::new(), taken_out })
    } else {
        let plan = plan(options, machine, &release)?;
        let finished = apply(options, plan, &work, &tree, progress, signals);
        match finished {
            Ok(done) => done,
            Err(error) => {
                super::keep_log(&work, &error);
                return Err(error);
            }
        }
    };
    let finish::Finished { kernels, taken_out } = finished;
    let tree = work.publish()?;
    let (arch, took) = (machine.name.to_owned(), started.elapsed());
    Ok(Built { tree, os, arch, kernels, locked: None, image: Some(image.digest), taken_out, took })
}

/// Unpacks all layers into `work.root()`.
fn unpack(
    image: &Image,
    work: &WorkDir,
    progress: &mut (dyn FnMut(Event<'_>) + Send),
    signals: Option<&SignalWatch>,
) -> Result<(), BuildError> {
    let path = work.root();
    let root = rustix::fs::open(&path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| BuildError::io("open the tree", &path, error.into()))?;
    progress(Event::Stage("unpacking the image"));
    let mut ended = None;
    let mut shown = 0;
    let unpacked = image.unpack(root.as_fd(), Limits::default(), &mut |at| {
        if at.layer != shown {
            shown = at.layer;
            progress(Event::Item { what: "unpacking", name: "layer", done: at.layer, total: at.layers });
        }
        let ends = |signal: &Signal| ASK_FOR_THE_END.contains(signal);
        ended = ended.or_else(|| signals.and_then(|signals| signals.take().into_iter().find(ends)));
        ended.is_none()
    });
    match (unpacked, ended) {
        (Ok(()), _) => Ok(()),
        (Err(OciError::Interrupted), Some(signal)) => Err(BuildError::Interrupted { signal, base_kept: false }),
        (Err(OciError::Full), _) => Err(BuildError::Full(work.tree().to_path_buf())),
        (Err(error), _) => Err(error.into()),
    }
}

/// What the recipe means for an image with that os-release.
fn plan(options: &Options, machine: Machine, release: &str) -> Result<Plan, BuildError> {
    let (said, known) = os::said_by(release);
    let os = match (options.recipe.os.as_deref(), known) {
        (None, Some(os)) => os,
        (None, None) => return Err(BuildError::UnknownImage(said)),
        (Some(name), Some(image)) if !os::is_path(name) && name != image.name => {
            return Err(BuildError::OtherSystem { image: image.name, recipe: name.to_owned() });
        }
        (Some(name), _) => os::find(name)?,
    };
    let mut options = options.clone();
    options.recipe.arch = Some(machine.machine().to_owned());
    Plan::new(&options, os)
}

/// Does what the recipe says to the tree. Gives the name of its system, and what finishing it gave.
fn apply(
    options: &Options,
    mut plan: Plan,
    work: &WorkDir,
    tree: &Tree,
    progress: &mut (dyn FnMut(Event<'_>) + Send),
    signals: Option<&SignalWatch>,
) -> Result<(String, finish::Finished), BuildError> {
    let backend = backend::get(plan.os.backend);
    for repository in &mut plan.repositories {
        repository.stage_key(work)?;
    }
    let mut units = Vec::new();
    if let Some(node_files) = &plan.node_files {
        stage::copy(node_files, &work.stage(), Machine::named(&plan.arch.machine)?)?;
        units = stage::units_to_enable(&work.stage())?;
        // What is installed on a running node later may.
        tree.remove(NO_SERVICES)?;
    }
    let mut tools = Tools::new(&work.log(), progress, signals)?;
    let mut context = Context { tools: &mut tools, work, plan: &plan, epoch: options.epoch };
    backend.write_repositories(&plan, tree)?;
    backend.add(&mut context)?;
    if plan.node_files.is_some() {
        lay::plant(tree, &work.stage())?;
    }
    let finished = finish::run(&mut context, &units)?;
    Ok((plan.os.name, finished))
}
