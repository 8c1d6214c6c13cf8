//! What keeps a node apart from the machine: namespaces of its own for network, mounts and processes, and a control group.
//! Bridge, iptables rules, mounts, pods and shims are in them, and the kernel ends all of it with their first process.
//! What Debian's programs write to `/run`, `/var/lib` and `/var/log` goes to memory.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::certs::HOST;
use crate::controlplane::SERVICES;
use crate::env;

/// With `--kill-child` all of it ends with the supervisor's child, however that ends.
const UNSHARE: [&str; 7] = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"];
/// Programs of the machine, and the Debian packages that they are in.
const PROGRAMS: [(&str, &str); 7] = [
    ("containerd", "containerd"),
    ("containerd-shim-runc-v2", "containerd"),
    ("runc", "runc"),
    ("iptables", "iptables"),
    ("ip", "iproute2"),
    ("mount", "mount"),
    ("unshare", "util-linux"),
];
/// Where Debian has the CNI plugins, and where others have them.
const PLUGINS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];
/// What the kubelet wants of the kernel. It reads it here, and sets nothing for the whole machine.
const SETTINGS: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];
const CGROUPS: &str = "/sys/fs/cgroup";
/// For the kernel to let go of a control group whose processes have just been killed.
const CGROUP_DEADLINE: Duration = Duration::from_secs(5);

/// An error that says why there can be no node here, if so.
pub(crate) fn check() -> Result<()> {
    ensure!(std::fs::metadata("/proc/self")?.uid() == 0, "only root may start containers");
    for (program, package) in PROGRAMS {
        ensure!(is_in_path(program), "there is no {program} (Debian's package {package})");
    }
    ensure!(plugins().is_some(), "there are no CNI plugins (Debian's package containernetworking-plugins)");
    let [program, arguments @ ..] = UNSHARE;
    let mut probe = Command::new(program);
    probe.args(arguments).args([
        "sh",
        "-c",
        "ip link add probe type bridge && mount -t tmpfs tmpfs /run && iptables -t nat -S",
    ]);
    let said = probe.stdin(Stdio::null()).output()?;
    let errors = String::from_utf8_lossy(&said.stderr);
    ensure!(said.status.success(), "namespaces, bridges or iptables are not allowed here: {}", errors.trim());
    let probe = tempfile::Builder::new().prefix("imagemirror-testenv-").tempdir()?;
    let created = create_cgroup(probe.path()).context("control groups are not allowed here");
    remove_cgroup(probe.path());
    created.map(drop)
}

/// The directory of the CNI plugins.
pub(crate) fn plugins() -> Option<PathBuf> {
    PLUGINS.into_iter().map(PathBuf::from).find(|dir| dir.join("bridge").is_file())
}

/// `program` within the walls. It is the first process there: everything ends with it.
pub(crate) fn within(program: &Path) -> Command {
    let [unshare, arguments @ ..] = UNSHARE;
    let mut command = Command::new(unshare);
    // Process ids mean something else to the guard, outside.
    command.args(arguments).args(["env", "-u", env::VARIABLE]).arg(program);
    command.stdin(Stdio::null());
    command
}

/// Within the walls, before anything else: a network with this machine at [`HOST`], and what is not the machine's.
pub(crate) fn furnish(dir: &Path) -> Result<()> {
    for line in [
        "ip link set lo up".to_owned(),
        format!("ip address add {HOST}/32 dev lo"),
        // Addresses of Services are nobody's: iptables sends on what is on its way to them.
        format!("ip route add {SERVICES} dev lo"),
        "mount -t tmpfs tmpfs /run".to_owned(),
        "mount -t tmpfs tmpfs /var/lib".to_owned(),
        "mount -t tmpfs tmpfs /var/log".to_owned(),
    ] {
        run(&line)?;
    }
    for (setting, value) in SETTINGS {
        let file = dir.join(setting.replace('/', "."));
        std::fs::write(&file, format!("{value}\n"))?;
        run(&format!("mount --bind {} /proc/sys/{setting}", file.display()))?;
    }
    Ok(())
}

fn run(line: &str) -> Result<()> {
    let mut words = line.split(' ');
    let said = Command::new(words.next().unwrap_or_default()).args(words).stdin(Stdio::null()).output()?;
    ensure!(said.status.success(), "`{line}` failed: {}", String::from_utf8_lossy(&said.stderr).trim());
    Ok(())
}

fn is_in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// Makes the control group of all pods of a run, in each hierarchy (one in version 2, one a controller in version 1), and
/// gives its name. The guard removes it.
pub(crate) fn create_cgroup(run_dir: &Path) -> Result<String> {
    let name = cgroup_of(run_dir);
    for hierarchy in hierarchies()? {
        let dir = hierarchy.join(&name);
        std::fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
        delegate_controllers(&hierarchy);
    }
    Ok(name)
}

/// Removes the control group of a run, if it has one; its processes must be about to be gone.
pub(crate) fn remove_cgroup(run_dir: &Path) {
    let deadline = Instant::now() + CGROUP_DEADLINE;
    for hierarchy in hierarchies().unwrap_or_default() {
        while !remove(&hierarchy.join(cgroup_of(run_dir))) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// As unique as the run directory.
fn cgroup_of(run_dir: &Path) -> String {
    run_dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn hierarchies() -> Result<Vec<PathBuf>> {
    let root = PathBuf::from(CGROUPS);
    if root.join("cgroup.controllers").exists() {
        return Ok(vec![root]);
    }
    let mounts = std::fs::read_to_string("/proc/mounts")?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    // Beside them there may be one of version 2 without controllers.
    let has_groups = |point: &PathBuf| point.parent() == Some(&root) && point.join("cgroup.procs").exists();
    Ok(points.filter(has_groups).collect())
}

/// In version 2, groups have the controllers that their parent gives them. Which of them are missed, the kubelet says.
fn delegate_controllers(hierarchy: &Path) {
    let controllers = std::fs::read_to_string(hierarchy.join("cgroup.controllers")).unwrap_or_default();
    for controller in controllers.split_whitespace() {
        let _ = std::fs::write(hierarchy.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

fn children(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

/// Removes a control group and those in it; whether it is gone.
fn remove(dir: &Path) -> bool {
    for child in children(dir) {
        remove(&child);
    }
    std::fs::remove_dir(dir).is_ok() || !dir.exists()
}
