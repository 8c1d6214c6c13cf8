//! The programs a run needs: found, or built from pinned Go modules. In this order for each: `$KUBEBUILDER_ASSETS` (the
//! convention of envtest), the cache `${XDG_CACHE_HOME:-~/.cache}/imagemirror/testenv/<hash of go.mod and go.sum>/`,
//! `go build` in `testenv/go/<module>`. A build fills the cache, so it happens once per pinned version.

use std::collections::hash_map::DefaultHasher;
use std::fs::File;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

use crate::process::Process;

/// Where the Go modules are, if not where this crate was compiled.
const GO_DIRECTORY: &str = "IMAGEMIRROR_TESTENV_GO";

/// A Go module in `testenv/go` and what is built from it.
struct Module {
    name: &'static str,
    programs: &'static [Program],
    ldflags: &'static str,
    takes: &'static str,
}

struct Program {
    name: &'static str,
    package: &'static str,
    /// What `go build` calls it, where that is not `name`.
    built_as: &'static str,
}

const fn program(name: &'static str, package: &'static str) -> Program {
    Program { name, package, built_as: name }
}

const MODULES: [Module; 6] = [
    Module {
        name: "registries",
        programs: &[
            program("registry", "github.com/distribution/distribution/v3/cmd/registry"),
            program("crane", "github.com/google/go-containerregistry/cmd/crane"),
            program("olareg", "github.com/olareg/olareg/cmd/olareg"),
            program("regctl", "github.com/regclient/regclient/cmd/regctl"),
            program("regsync", "github.com/regclient/regclient/cmd/regsync"),
        ],
        ldflags: "-s -w",
        takes: "2 minutes",
    },
    Module {
        name: "registry2",
        programs: &[program("registry2", "imagemirror.dev/testenv/registry2")],
        ldflags: "-s -w -X github.com/docker/distribution/version.Version=v2.8.3",
        takes: "20 seconds",
    },
    Module {
        name: "cluster",
        programs: &[
            Program { name: "etcd", package: "go.etcd.io/etcd/server/v3", built_as: "server" },
            program("helm", "helm.sh/helm/v4/cmd/helm"),
        ],
        ldflags: "-s -w",
        takes: "2 minutes",
    },
    Module {
        name: "kubernetes",
        programs: &[
            program("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
            program("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
            program("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
        ],
        ldflags: KUBERNETES_LDFLAGS,
        takes: "5 minutes",
    },
    Module {
        name: CHART,
        programs: &[
            program("helm-unittest", "github.com/helm-unittest/helm-unittest/cmd/helm-unittest"),
            Program { name: "promql", package: "imagemirror.dev/testenv/chart", built_as: "chart" },
        ],
        ldflags: "-s -w",
        takes: "1 minute",
    },
    Module {
        name: GITOPS,
        programs: &[program("gitops", "imagemirror.dev/testenv/gitops")],
        ldflags: "-s -w",
        takes: "1 minute",
    },
];

/// What a node needs beside the control plane.
const NODE: Module = Module {
    name: "kubernetes",
    programs: &[
        program("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
        program("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
        program("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
    ],
    ldflags: KUBERNETES_LDFLAGS,
    takes: "3 minutes",
};

/// Without it the API server says v0.0.0 and clients complain.
const KUBERNETES_LDFLAGS: &str = "-s -w -X k8s.io/component-base/version.gitVersion=v1.34.4";

/// What the tests of the chart alone need.
const CHART: &str = "chart";
/// What the tests with Argo CD's and Flux's libraries alone need.
const GITOPS: &str = "gitops";

/// A directory that holds every program under its usual name.
#[derive(Clone, Debug)]
pub struct Tools {
    pub dir: PathBuf,
}

impl Tools {
    #[must_use]
    pub fn path(&self, program: &str) -> PathBuf {
        self.dir.join(program)
    }
}

/// Finds or builds every program and makes a directory of links to them in the cache.
pub async fn find_all() -> Result<Tools> {
    find_modules(MODULES.iter().filter(|module| ![CHART, GITOPS].contains(&module.name)).collect()).await
}

/// `gitops`, which runs scripts as Argo CD does and waits as Flux does.
pub async fn find_gitops() -> Result<Tools> {
    find_modules(MODULES.iter().filter(|module| module.name == GITOPS).collect()).await
}

/// The same with the programs of a node.
pub async fn find_all_and_node() -> Result<Tools> {
    find_modules(MODULES.iter().filter(|module| module.name != CHART).chain([&NODE]).collect()).await
}

/// What tests the chart: `helm-unittest`, and `promql`, which reads expressions as Prometheus does.
pub async fn find_chart() -> Result<Tools> {
    find_modules(MODULES.iter().filter(|module| module.name == CHART).collect()).await
}

/// The same for the registries and their clients alone: nothing of Kubernetes is built.
pub async fn find_registries() -> Result<Tools> {
    find_modules(MODULES.iter().filter(|module| module.name == "registries").collect()).await
}

async fn find_modules(modules: Vec<&Module>) -> Result<Tools> {
    let mut found = Vec::new();
    for module in modules {
        found.extend(find(module).await?);
    }
    let mut hash = DefaultHasher::new();
    found.hash(&mut hash);
    let dir = cache()?.join(format!("bin-{:016x}", hash.finish()));
    if !dir.exists() {
        let fresh = fresh_dir()?;
        for (name, path) in &found {
            std::os::unix::fs::symlink(path, fresh.path().join(name))?;
        }
        publish(fresh, &dir)?;
    }
    Ok(Tools { dir })
}

/// Builds `package` of the Go module `module` for Linux on `arch` (`amd64`, `arm64`), static and stripped, and gives the
/// program's path in the cache.
pub async fn cross(module: &str, package: &str, arch: &str) -> Result<PathBuf> {
    let module = MODULES.iter().find(|known| known.name == module).with_context(|| format!("no Go module {module}"))?;
    let name = package.rsplit('/').next().unwrap_or(package);
    let dir = cache_of(module)?.join(format!("linux_{arch}")).join(name);
    let _lock = lock(module).await?;
    if !dir.exists() {
        eprintln!("testenv: building {name} for linux/{arch} (the first time only)");
        let fresh = fresh_dir()?;
        go_build(module, &[package], Some(arch), fresh.path()).await?;
        publish(fresh, &dir)?;
    }
    Ok(dir.join(name))
}

async fn find(module: &Module) -> Result<Vec<(&'static str, PathBuf)>> {
    let cached = cache_of(module)?;
    let _lock = lock(module).await?;
    let missing: Vec<&Program> = module.programs.iter().filter(|program| locate(program, &cached).is_none()).collect();
    if !missing.is_empty() {
        let names: Vec<_> = missing.iter().map(|program| program.name).collect();
        eprintln!("testenv: building {} (about {}, the first time only)", names.join(", "), module.takes);
        let started = Instant::now();
        let fresh = fresh_dir()?;
        let packages: Vec<_> = missing.iter().map(|program| program.package).collect();
        go_build(module, &packages, None, fresh.path()).await?;
        std::fs::create_dir_all(&cached)?;
        for program in missing {
            std::fs::rename(fresh.path().join(program.built_as), cached.join(program.name))
                .with_context(|| format!("go build made no {}", program.built_as))?;
        }
        eprintln!("testenv: built {} in {} s", names.join(", "), started.elapsed().as_secs());
    }
    let mut found = Vec::new();
    for program in module.programs {
        found.push((program.name, locate(program, &cached).with_context(|| format!("no {}", program.name))?));
    }
    Ok(found)
}

fn locate(program: &Program, cached: &Path) -> Option<PathBuf> {
    let assets = std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
    let candidates = assets.into_iter().chain([cached.to_owned()]).map(|dir| dir.join(program.name));
    candidates.into_iter().find(|path| path.is_file())
}

async fn go_build(module: &Module, packages: &[&str], arch: Option<&str>, into: &Path) -> Result<()> {
    let mut command = Command::new("go");
    command
        .args(["build", "-trimpath", "-mod=readonly", "-ldflags", module.ldflags, "-o"])
        .arg(format!("{}/", into.display()))
        .args(packages)
        .current_dir(go_directory(module)?)
        .env("CGO_ENABLED", "0")
        .env("GOWORK", "off");
    if let Some(arch) = arch {
        command.env("GOOS", "linux").env("GOARCH", arch);
    }
    let log = tempfile::Builder::new().prefix("testenv-go-build-").suffix(".log").tempfile()?;
    let mut build = Process::spawn("go build (is Go 1.26 or later installed?)", command, log.path())?;
    let status = build.wait().await?;
    if !status.success() {
        bail!("go build of {} failed ({status}):\n{}", packages.join(" "), std::fs::read_to_string(log.path())?);
    }
    Ok(())
}

fn go_directory(module: &Module) -> Result<PathBuf> {
    let base =
        std::env::var_os(GO_DIRECTORY).map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("go"), PathBuf::from);
    let dir = base.join(module.name);
    if !dir.join("go.mod").is_file() {
        bail!("{} holds no go.mod; set {GO_DIRECTORY} to testenv/go of the repository", dir.display());
    }
    Ok(dir)
}

fn cache() -> Result<PathBuf> {
    let base = match (std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME")) {
        (Some(cache), _) if !cache.is_empty() => PathBuf::from(cache),
        (_, Some(home)) => PathBuf::from(home).join(".cache"),
        _ => bail!("neither XDG_CACHE_HOME nor HOME says where the cache is"),
    };
    let dir = base.join("imagemirror/testenv");
    std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    Ok(dir)
}

fn cache_of(module: &Module) -> Result<PathBuf> {
    let go = go_directory(module)?;
    let mut hash = Sha256::new();
    for file in ["go.mod", "go.sum"] {
        hash.update(std::fs::read(go.join(file)).with_context(|| format!("read {file} of {}", go.display()))?);
    }
    // A program of our own.
    let files = std::fs::read_dir(&go)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let is_ours = |path: &PathBuf| path.extension().is_some_and(|is| is == "go") && !path.ends_with("tools.go");
    let mut ours: Vec<PathBuf> = files.into_iter().filter(is_ours).collect();
    ours.sort();
    for file in ours {
        hash.update(std::fs::read(file)?);
    }
    Ok(cache()?.join(&crate::images::hex(&hash.finalize())[..16]))
}

/// Held while a module is looked up or built, so that two runs do not build the same at once. Given back by the kernel
/// however the holder ends.
async fn lock(module: &Module) -> Result<Flock<File>> {
    let path = cache()?.join(format!("{}.lock", module.name));
    let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    let locked = tokio::task::spawn_blocking(|| match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((file, _)) => {
            eprintln!("testenv: waiting for another run that builds");
            Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error)
        }
    });
    locked.await?.context("lock the cache")
}

/// A directory in the cache's file system, so that what is in it can be renamed into place.
fn fresh_dir() -> Result<tempfile::TempDir> {
    Ok(tempfile::Builder::new().prefix("tmp-").tempdir_in(cache()?)?)
}

/// Renames a finished directory into place; another run may have been faster with the same content.
fn publish(fresh: tempfile::TempDir, dir: &Path) -> Result<()> {
    if let Some(parent) = dir.parent() {
        std::fs::create_dir_all(parent)?;
    }
    match std::fs::rename(fresh.path(), dir) {
        Ok(()) => drop(fresh.keep()),
        Err(_) if dir.exists() => {}
        Err(error) => return Err(error).with_context(|| format!("rename to {}", dir.display())),
    }
    Ok(())
}
