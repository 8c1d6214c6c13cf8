//! `testenv e2e`, the program behind `make e2e`: the image and the chart as a user has them, on a real node. Helm installs
//! two replicas, the leader's pod is deleted in mid-copy, and a pod runs from what was mirrored. Each step is checked:
//! what does not come out as said is an error, with what Kubernetes and the pods say.

mod cluster;
mod steps;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};

use self::cluster::Cluster;
use crate::node::walls;
use crate::process::Process;
use crate::supervisor::{exit_code, session};
use crate::terminal::say;
use crate::tools::{self, Tools};

/// What to install, and where everything is.
#[derive(Clone, Debug, clap::Args)]
pub struct Inside {
    /// The operator's image, an OCI image layout.
    #[arg(long)]
    pub image: PathBuf,
    #[arg(long)]
    pub run_dir: PathBuf,
    #[arg(long)]
    pub tools: PathBuf,
    /// The control group of the pods.
    #[arg(long)]
    pub cgroup: String,
}

/// Runs the test with the operator's `image` and gives the exit code, which is 0 too where there can be no node.
pub fn run(image: &Path) -> Result<u8> {
    if let Err(reason) = walls::check() {
        say(&format!("end to end: skipped: {reason:#}"));
        return Ok(0);
    }
    let image = image.canonicalize().with_context(|| format!("no image at {}: `make image`", image.display()))?;
    session(async |run_dir: &Path| {
        let tools = tools::find_all_and_node().await?;
        let cgroup = walls::create_cgroup(run_dir)?;
        let mut command = walls::within(&std::env::current_exe()?);
        command.arg("e2e-inside").arg("--image").arg(&image).arg("--run-dir").arg(run_dir);
        command.arg("--tools").arg(&tools.dir).args(["--cgroup", &cgroup]);
        let mut inside = Process::spawn_foreground("the end-to-end test", command)?;
        let status = inside.wait().await?;
        Ok(exit_code(status))
    })
}

/// The part within the walls.
pub fn run_inside(options: &Inside) -> Result<u8> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            result = play(options) => result,
            _ = terminate.recv() => bail!("interrupted"),
        }
    })?;
    Ok(0)
}

async fn play(options: &Inside) -> Result<()> {
    let started = Instant::now();
    let dir = options.run_dir.join("node");
    std::fs::create_dir(&dir)?;
    walls::furnish(&dir)?;
    let tools = Tools { dir: options.tools.clone() };
    let cluster = Cluster::start(&tools, options, started).await?;
    if let Err(error) = steps::all(&cluster, &options.image).await {
        cluster.explain().await;
        return Err(error);
    }
    say(&format!("end to end: everything came out as it should, in {} s", started.elapsed().as_secs()));
    Ok(())
}
