//! A sync in this process, between registries and layout directories in any pairing, and what a directory then holds as
//! it is read without the engine.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use imagemirror::{
    copy::{CopyOptions, Fence, Progress, Referrers},
    plan::Policy,
    reason::Reason,
    registry::{Client, Layout},
    sync::{Destination, ImageRequest, Last, Registries, Sources, SyncReport, SyncRequest, sync},
};
use serde_json::Value;
use testenv::{
    Content, Env, Image, Registry, RegistryServer,
    registry::{Kind, RegistryOptions},
};
use tokio_util::sync::CancellationToken;

use crate::cases::access;

/// The host that images in a directory are called by, where no registry stands behind it.
pub(crate) const HOST: &str = "registry.example";

/// Where images come from or go.
pub(crate) enum Place<'a> {
    Registry(&'a Registry),
    Directory(&'a Layout),
}

impl<'a> From<&'a Registry> for Place<'a> {
    fn from(registry: &'a Registry) -> Self {
        Self::Registry(registry)
    }
}

impl<'a> From<&'a Layout> for Place<'a> {
    fn from(layout: &'a Layout) -> Self {
        Self::Directory(layout)
    }
}

/// A sync that is put together and run.
pub(crate) struct Direct {
    client: Client,
    options: CopyOptions,
    looks_at_attached: bool,
    host: Option<String>,
    images: Vec<Wanted>,
}

struct Wanted {
    from: String,
    to: String,
    platforms: Vec<String>,
    last: Option<Last>,
}

impl Direct {
    /// Of one image, `repository:tag` or `repository@digest`, into `repository:tag`.
    pub(crate) fn of(from: &str, to: &str) -> Self {
        let this = Self {
            client: crate::cases::client(),
            options: CopyOptions::default(),
            looks_at_attached: true,
            host: None,
            images: Vec::new(),
        };
        this.and(from, to)
    }

    /// And of another one.
    pub(crate) fn and(mut self, from: &str, to: &str) -> Self {
        self.images.push(Wanted { from: from.into(), to: to.into(), platforms: Vec::new(), last: None });
        self
    }

    /// With a client of its own, that knows other things or keeps what it has learned.
    pub(crate) fn with(self, client: &Client) -> Self {
        Self { client: client.clone(), ..self }
    }

    /// With these options.
    pub(crate) fn options(self, options: CopyOptions) -> Self {
        Self { options, ..self }
    }

    pub(crate) fn referrers(self, referrers: Referrers) -> Self {
        let options = CopyOptions { referrers, ..self.options };
        Self { options, ..self }
    }

    /// Of all images so far, these platforms.
    pub(crate) fn platforms(mut self, platforms: &[&str]) -> Self {
        for image in &mut self.images {
            image.platforms = platforms.iter().map(ToString::to_string).collect();
        }
        self
    }

    /// Knowing how everything was after an earlier run.
    pub(crate) fn after(mut self, report: &SyncReport) -> Self {
        for (image, was) in self.images.iter_mut().zip(&report.images) {
            image.last = was.digest.clone().map(|digest| Last { digest, source_digest: was.source_digest.clone() });
        }
        self
    }

    /// Without a look at what is attached to images that have not changed.
    pub(crate) fn without_a_look(self) -> Self {
        Self { looks_at_attached: false, ..self }
    }

    /// Images from a registry are called by this host too: so they are found in a directory whatever its port is.
    pub(crate) fn called(self, host: &str) -> Self {
        Self { host: Some(host.into()), ..self }
    }

    /// Runs it.
    pub(crate) async fn run<'a>(
        &self,
        source: impl Into<Place<'a>>,
        target: impl Into<Place<'a>>,
    ) -> Result<SyncReport> {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let env = Env::get();
        let (host, sources) = match source.into() {
            Place::Registry(registry) => {
                let host = self.host.clone().unwrap_or_else(|| registry.host.clone());
                let access = access(env, registry)?;
                (host.clone(), Sources::Registries([(host.parse()?, access)].into()))
            }
            Place::Directory(layout) => {
                (self.host.clone().unwrap_or_else(|| HOST.to_owned()), Sources::Layout(layout.clone()))
            }
        };
        let target = match target.into() {
            Place::Registry(registry) => Destination::Registry(access(env, registry)?),
            Place::Directory(layout) => Destination::Layout(layout.clone()),
        };
        let request = SyncRequest {
            images: self.images.iter().map(|image| image.request(&host)).collect::<Result<_>>()?,
            unknown: Vec::new(),
            timeout: Duration::from_mins(1),
            options: self.options.clone(),
            policy: Policy::default(),
            looks_at_attached: self.looks_at_attached,
        };
        let (registries, cancel) = (Registries { sources, target }, CancellationToken::new());
        let run = sync(&self.client, &request, &registries, Fence::Open, Arc::new(Progress::default()), &cancel);
        run.await.context("cancelled")
    }

    /// Runs it; a failed image is an error.
    pub(crate) async fn done<'a>(
        &self,
        source: impl Into<Place<'a>>,
        target: impl Into<Place<'a>>,
    ) -> Result<SyncReport> {
        let report = self.run(source, target).await?;
        let failures: Vec<String> =
            report.failed().map(|(image, failure)| format!("{}: {failure:?}", image.target)).collect();
        ensure!(failures.is_empty(), "{}", failures.join("\n"));
        Ok(report)
    }

    /// Runs it; that the first image does not fail is an error.
    pub(crate) async fn fails<'a>(
        &self,
        source: impl Into<Place<'a>>,
        target: impl Into<Place<'a>>,
    ) -> Result<(Reason, String)> {
        let report = self.run(source, target).await?;
        let failure = report.images.into_iter().next().and_then(|image| image.failure).context("it did not fail")?;
        Ok((failure.reason, failure.message))
    }
}

impl Wanted {
    fn request(&self, host: &str) -> Result<ImageRequest> {
        let (repository, tag) = self.to.rsplit_once(':').context("a target without a tag")?;
        Ok(ImageRequest {
            source: format!("{host}/{}", self.from).parse::<imagemirror::oci::Reference>()?.into(),
            target_repository: repository.parse()?,
            target_tag: tag.parse()?,
            platforms: self.platforms.iter().map(|platform| platform.parse()).collect::<Result<_, _>>()?,
            last: self.last.clone(),
            is_contested: false,
            blocked: None,
        })
    }
}

/// A first part for the repositories of a test.
pub(crate) fn prefix(test: &str) -> String {
    format!("{test}-{:06x}", fastrand::u32(..0x100_0000))
}

/// A registry for one test, without TLS and without logins.
pub(crate) async fn server(kind: Kind) -> Result<RegistryServer> {
    let options = RegistryOptions { name: format!("{kind:?}"), kind, tls: false, ..RegistryOptions::default() };
    RegistryServer::start(Env::get(), options).await
}

pub(crate) fn client_of(registry: &Registry) -> Result<testenv::Client> {
    testenv::Client::new(Env::get(), registry)
}

/// A directory in the form of an OCI image layout, read by hand (image-spec, image-layout.md).
pub(crate) struct Directory {
    dir: tempfile::TempDir,
}

impl Directory {
    /// An empty one.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self { dir: tempfile::Builder::new().prefix("layout-").tempdir_in(&Env::get().run_dir)? })
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn layout(&self) -> Result<Layout> {
        Ok(Layout::create(self.path())?)
    }

    pub(crate) fn blob_path(&self, digest: &str) -> PathBuf {
        self.path().join("blobs").join(digest.replacen(':', "/", 1))
    }

    /// The entries of `index.json`.
    pub(crate) fn entries(&self) -> Result<Vec<Value>> {
        let index: Value = serde_json::from_slice(&std::fs::read(self.path().join("index.json"))?)?;
        Ok(index["manifests"].as_array().context("index.json lists nothing")?.clone())
    }

    /// The digest that a whole name has; none if it is not there.
    pub(crate) fn digest_of(&self, name: &str) -> Result<Option<String>> {
        let entries = self.entries()?;
        let is_it = |entry: &&Value| entry["annotations"]["org.opencontainers.image.ref.name"] == name;
        let found: Vec<&Value> = entries.iter().filter(is_it).collect();
        ensure!(found.len() <= 1, "{name} is there {} times", found.len());
        Ok(found.first().and_then(|entry| entry["digest"].as_str()).map(ToOwned::to_owned))
    }

    /// Whether the name is that of this image, and every byte of it is there.
    pub(crate) fn holds(&self, name: &str, image: &Image) -> Result<bool> {
        let mut entries = self.entries()?.into_iter();
        let entry = entries.find(|entry| entry["annotations"]["org.opencontainers.image.ref.name"] == name);
        let is_entry = entry.is_some_and(|entry| {
            entry["digest"] == image.digest()
                && entry["size"] == image.root.bytes.len()
                && entry["mediaType"] == image.root.media_type
        });
        Ok(is_entry && self.has(&image.root) && image.manifests.iter().chain(&image.blobs).all(|part| self.has(part)))
    }

    /// Whether this content is there under its digest.
    pub(crate) fn has(&self, content: &Content) -> bool {
        std::fs::read(self.blob_path(&content.digest)).is_ok_and(|bytes| bytes == content.bytes)
    }
}
