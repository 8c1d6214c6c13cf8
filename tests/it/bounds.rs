//! Registries that want our memory or our time, all at once, while the operator may have 128 MiB: none of them gets it,
//! each is told apart, and an honest mirror beside them is synced.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use testenv::{
    hostile::{Hostile, Threat},
    images::Image,
};

use crate::{
    packaging::assembled,
    support::{PATIENCE, Place},
};

const LIMIT: u64 = 128 << 20;
const MOST: u64 = 96 << 20;

/// The reasons that the mirror of a threat may give. Whoever wants much time may find that it is over.
fn reasons(threat: Threat) -> &'static [&'static str] {
    match threat {
        Threat::Huge | Threat::Endless | Threat::Keys | Threat::Members | Threat::Deep => {
            &["ManifestRefused", "Timeout"]
        }
        Threat::Pages | Threat::Tags => &["SourceUnavailable", "Timeout"],
        Threat::Redirects => &["Blocked", "Timeout"],
        Threat::Size => &["IntegrityError", "Timeout"],
        Threat::Children | Threat::Bomb | Threat::Large | Threat::Slow | Threat::Silent => {
            &["SourceUnavailable", "Timeout"]
        }
    }
}

/// A group of processes that may have so much memory, where this machine lets us make one.
struct MemoryLimit(PathBuf);

impl MemoryLimit {
    fn of(pid: i32, bytes: u64) -> Option<Self> {
        let name = format!("imagemirror-test-{pid}");
        [("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")].into_iter().find_map(
            |(root, file)| {
                let group = Path::new(root).join(&name);
                std::fs::create_dir(&group).ok()?;
                let made = Self(group.clone());
                // An ordinary directory has no such file, and would take whatever is written to it.
                if !group.join(file).exists() {
                    return None;
                }
                let set = std::fs::write(group.join(file), bytes.to_string())
                    .and_then(|()| std::fs::write(group.join("cgroup.procs"), pid.to_string()));
                set.ok().map(|()| made)
            },
        )
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// The most memory that a process has held, in bytes.
fn peak(pid: i32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_registries_get_neither_the_memory_nor_the_time_of_others() -> Result<()> {
    let (place, others) = (Place::new("bounds").await?, Place::new("bounds-others").await?);
    let hostile = Hostile::start().await?;
    let honest = Image::multi_arch(9, &[3_000_000, 2_000_000], &["linux/amd64", "linux/arm64"]);
    place.push(&place.env.source, "agent", "1", &honest).await?;

    let short = json!({
        "headTimeout": "2s", "idleTimeout": "2s", "floorWindow": "2s", "retryTransientMin": "1m", "retryTransientMax": "1m",
    });
    place.serve(&others)?;
    // What is not optimised takes more.
    let released = assembled()?;
    let mut command = Command::new(released.root.path().join("imagemirror"));
    command.envs(released.variables);
    let operator = place.start(command, &place.settings(json!({}), &short)?, &["--log-level", "info"])?;
    let limit = MemoryLimit::of(operator.process.pid(), LIMIT);
    for round in 0..2 {
        for threat in Threat::ALL {
            let spec = json!({
                "timeout": "6s",
                "target": {"registry": place.env.open.host, "repository": format!("{}/{round}/{{name}}", others.prefix)},
                "registries": [{"host": hostile.host, "plainHTTP": true}, {"host": place.env.open.host, "plainHTTP": true}],
                "images": [threat.image(&hostile.host)],
            });
            others.apply(&format!("{}-{round}", threat.name()), &spec).await?;
        }
    }
    place.apply("honest", &place.spec(&place.env.source, &place.env.target, &[("agent", &["1"])])).await?;
    place.until_ready("honest").await?;
    ensure!(place.holds(&place.env.target, "agent", "1", &honest).await?);
    for round in 0..2 {
        for threat in Threat::ALL {
            let name = format!("{}-{round}", threat.name());
            let failed = others.until(&name, "a failure", |status| !status.failures.is_empty());
            let status = tokio::time::timeout(2 * PATIENCE, failed).await.context(name)??.status.unwrap_or_default();
            let failure = status.failures.first().context("no failure")?;
            let (reason, message) = (failure.reason.as_str(), &failure.message);
            // Whoever wants much memory may find that the others have it.
            let has_no_room = reason == "InternalError" && message.contains("limits.memory");
            ensure!(reasons(threat).contains(&reason) || has_no_room, "{threat:?}: {reason}: {message}");
        }
    }
    let peak = peak(operator.process.pid())?;
    ensure!(peak <= MOST, "the operator held {} MiB (limited by the kernel: {})", peak >> 20, limit.is_some());
    println!("peak: {} MiB", peak >> 20);
    operator.process.stop().await?;
    drop(limit);
    Ok(())
}
