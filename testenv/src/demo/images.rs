//! The three images of the sample, made of real programs for two platforms: Go tools of the environment, compiled for
//! each. They go to the source directly; the slow line is for the operator.

use anyhow::{Context, Result};

use crate::client::Client;
use crate::env::Env;
use crate::images::Image;
use crate::{terminal, tools};

pub(super) const PLATFORMS: [&str; 2] = ["linux/amd64", "linux/arm64"];

const CRANE: &str = "github.com/google/go-containerregistry/cmd/crane";
const OLAREG: &str = "github.com/olareg/olareg/cmd/olareg";
const DIGEST: &str = "github.com/distribution/distribution/v3/cmd/digest";

/// An image of config/samples/datadog.yaml.
pub(super) struct Tagged {
    pub(super) name: &'static str,
    pub(super) tag: &'static str,
    pub(super) image: Image,
}

impl Tagged {
    /// As config/samples/datadog.yaml names it, after the registry's host.
    pub(super) fn at_source(&self) -> String {
        format!("datadoghq/{}:{}", self.name, self.tag)
    }

    /// Where its target.repository puts it.
    pub(super) fn at_target(&self) -> String {
        format!("datadog/{}:{}", self.name, self.tag)
    }

    pub(super) fn short_name(&self) -> String {
        format!("{}:{}", self.name, self.tag)
    }

    /// What each reference is and its digest: the index, and the manifest of each platform.
    pub(super) fn digests(&self) -> Vec<(&'static str, &str)> {
        let platforms = PLATFORMS.iter().zip(&self.image.manifests);
        let platforms = platforms.map(|(platform, manifest)| (*platform, manifest.digest.as_str()));
        [("index", self.image.digest())].into_iter().chain(platforms).collect()
    }

    pub(super) async fn push(&self, env: &Env) -> Result<()> {
        let client = Client::new(env, &env.source)?;
        client.push(&format!("datadoghq/{}", self.name), self.tag, &self.image).await?;
        let (size, digest) = (terminal::megabytes(self.image.size() as u64), terminal::short(self.image.digest()));
        terminal::output(&format!("{:<32} {size:>5} MB  {digest}", self.at_source()));
        Ok(())
    }
}

/// What the source holds at first.
pub(super) async fn first() -> Result<[Tagged; 3]> {
    Ok([
        Tagged { name: "agent", tag: "7.70.0", image: image_of(&[CRANE]).await? },
        Tagged { name: "cluster-agent", tag: "7.70.0", image: image_of(&[OLAREG]).await? },
        Tagged { name: "operator", tag: "1.18.0", image: image_of(&[DIGEST]).await? },
    ])
}

/// The agent under the same tag, rebuilt: one layer is new, the other one is as it was.
pub(super) async fn rebuilt_agent() -> Result<Tagged> {
    Ok(Tagged { name: "agent", tag: "7.70.0", image: image_of(&[CRANE, DIGEST]).await? })
}

/// The operator under the same tag, with a layer that the target has nowhere.
pub(super) fn rebuilt_operator() -> Tagged {
    Tagged { name: "operator", tag: "1.18.0", image: Image::multi_arch(1, &[10_000_000], &PLATFORMS) }
}

async fn image_of(packages: &[&'static str]) -> Result<Image> {
    let mut platforms = Vec::new();
    for platform in PLATFORMS {
        let (_, arch) = platform.split_once('/').context("a platform without an architecture")?;
        let mut files = Vec::new();
        for package in packages {
            let program = tools::cross("registries", package, arch).await?;
            let name = program.file_name().context("a program without a name")?.to_string_lossy().into_owned();
            files.push((format!("usr/bin/{name}"), program));
        }
        platforms.push((platform, files));
    }
    // Reading and hashing keep a thread busy, and Ctrl-C must be heard meanwhile.
    tokio::task::spawn_blocking(move || {
        let files: Vec<_> = platforms
            .iter()
            .map(|(_, files)| files.iter().map(|(path, file)| (path.as_str(), file.as_path())).collect::<Vec<_>>())
            .collect();
        let parts: Vec<_> =
            platforms.iter().zip(&files).map(|((platform, _), files)| (*platform, &files[..])).collect();
        Image::of_programs(&parts)
    })
    .await?
}
