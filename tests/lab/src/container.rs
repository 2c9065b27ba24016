//! A container image of Debian, in the form of `podman save`, and the node that `imgutil build --from` makes of it.

use crate::bins::Bins;
use crate::process::{run, run_shown, tied};
use crate::tree::OS;
use anyhow::Context as _;
use serde_json::json;
use std::path::{Path, PathBuf};

/// What the container's maker has put in.
pub const MOTD: &str = "from a container\n";

/// A recipe for a node: `base` is left out.
const RECIPE: &str = r#"
packages = ["hello"]
services = ["greeting.service"]
disable = ["systemd-timesyncd.service"]
run = ["hello > /etc/hello"]
[[file]]
path = "/etc/systemd/system/greeting.service"
content = """
[Service]
Type=oneshot
ExecStart=/usr/bin/hello
[Install]
WantedBy=multi-user.target
"""
"#;

/// Makes the image and the node's tree in `work`; the tree.
///
/// # Errors
/// A step failed; with what it printed.
pub fn node(bins: &Bins, work: &Path) -> anyhow::Result<PathBuf> {
    let image = image(bins, work)?;
    let stage = work.join("node-files");
    run(tied(bins.workspace.join("packaging/stage-node")).arg(&stage).arg(&bins.dir))
        .context("staging the node's files")?;
    let (recipe, tree) = (work.join("recipe.toml"), work.join("node"));
    std::fs::write(&recipe, RECIPE).context("writing the recipe")?;
    run_shown(
        tied(bins.path("imgutil"))
            .arg("build")
            .arg("--from")
            .arg(&image)
            .arg("-f")
            .arg(&recipe)
            .arg("--node-files")
            .arg(&stage)
            .arg(&tree),
    )
    .context("imgutil build --from")?;
    Ok(tree)
}

fn image(bins: &Bins, work: &Path) -> anyhow::Result<PathBuf> {
    let tree = work.join("container");
    run_shown(tied(bins.path("imgutil")).args(["build", "--no-cache", "--minimal", "--os", OS]).arg(&tree))
        .context("imgutil build --minimal")?;
    std::fs::write(tree.join("etc/motd"), MOTD).context("writing into the container")?;
    // As Debian's own container images have it.
    std::fs::write(tree.join("usr/sbin/policy-rc.d"), "#!/bin/sh\nexit 101\n").context("writing into the container")?;
    let parts = work.join("parts");
    std::fs::create_dir(&parts).context("making a folder")?;
    run(tied("tar").arg("-C").arg(&tree).args(["--numeric-owner", "-cf"]).arg(parts.join("layer.tar")).arg("."))?;
    let layer = sha256(&parts.join("layer.tar"))?;
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{layer}")] },
    });
    std::fs::write(parts.join("config"), config.to_string()).context("writing the configuration")?;
    let name = format!("{}.json", sha256(&parts.join("config"))?);
    std::fs::rename(parts.join("config"), parts.join(&name)).context("naming the configuration")?;
    let list = json!([{ "Config": name, "RepoTags": ["node:1"], "Layers": ["layer.tar"] }]);
    std::fs::write(parts.join("manifest.json"), list.to_string()).context("writing the manifest")?;
    let image = work.join("image.tar");
    run(tied("tar").arg("-C").arg(&parts).arg("-cf").arg(&image).args(["manifest.json", &name, "layer.tar"]))?;
    Ok(image)
}

fn sha256(path: &Path) -> anyhow::Result<String> {
    let output = run(tied("sha256sum").arg(path))?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split(' ').next().context("sha256sum printed nothing")?.to_owned())
}
