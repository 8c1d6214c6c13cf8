//! What tests of many cases share: one copy in this process with short times, and cases that run side by side so that
//! one run shows every failure.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use futures::{StreamExt as _, stream};
use imagemirror::{
    auth::CredentialStore,
    copy::{CopyOptions, Fence, Progress, Referrers},
    plan::Policy,
    registry::{Access, Client, ClientOptions, Timing, Transport},
    sync::{Destination, ImageRequest, Registries, Sources, SyncReport, SyncRequest, sync},
};
use testenv::{Env, Registry};
use tokio_util::sync::CancellationToken;

/// Cases that run side by side.
const AT_ONCE: usize = 8;

/// What a case needs of the process before it starts.
pub(crate) fn env() -> &'static Env {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    Env::get()
}

/// A repository prefix that no other test uses.
pub(crate) fn prefix(test: &str) -> String {
    format!("{test}-{:06x}", fastrand::u32(..0x100_0000))
}

pub(crate) fn access(env: &Env, registry: &Registry) -> Result<Access> {
    let credentials = match registry.username {
        None => CredentialStore::default(),
        Some(_) => CredentialStore::from_docker_config_json(registry.dockerconfigjson().as_bytes(), "the test")?,
    };
    let ca = registry.tls.then(|| env.ca_pem.clone().into_bytes().into());
    let transport = Transport { plain_http: !registry.tls, ca, ..Transport::default() };
    Ok(Access { host: registry.host.parse()?, transport, credentials })
}

/// Times that suit a test: what is slow because the machine is busy is not given up.
pub(crate) fn options() -> ClientOptions {
    let timing = Timing {
        head: Duration::from_secs(5),
        idle: Duration::from_secs(5),
        answer: Duration::from_secs(5),
        backoff_first: Duration::from_millis(5),
        backoff_max: Duration::from_millis(20),
        rate_pause: Duration::from_millis(20),
        ..Timing::default()
    };
    ClientOptions { timing, ..ClientOptions::default() }
}

pub(crate) fn client() -> Client {
    Client::new(options())
}

/// `repository:1` at the source into `to:1` at the target.
pub(crate) fn image(source: &Access, repository: &str, to: &str) -> Result<ImageRequest> {
    Ok(ImageRequest {
        source: format!("{}/{repository}:1", source.host).parse::<imagemirror::oci::Reference>()?.into(),
        target_repository: to.parse()?,
        target_tag: "1".parse()?,
        platforms: Vec::new(),
        last: None,
        is_contested: false,
        blocked: None,
    })
}

/// One sync of these images, all from one source.
pub(crate) async fn sync_with(
    client: &Client,
    source: Access,
    target: Access,
    images: Vec<ImageRequest>,
) -> Result<SyncReport> {
    sync_from(client, vec![source], target, images).await
}

/// One sync of images from several sources.
pub(crate) async fn sync_from(
    client: &Client,
    sources: Vec<Access>,
    target: Access,
    images: Vec<ImageRequest>,
) -> Result<SyncReport> {
    // Nobody asks for what is attached: requests are counted.
    let options = CopyOptions { referrers: Referrers::None, ..CopyOptions::default() };
    sync_images(client, sources, target, images, options).await
}

/// One sync of images from several sources, with these options.
pub(crate) async fn sync_images(
    client: &Client,
    sources: Vec<Access>,
    target: Access,
    images: Vec<ImageRequest>,
    options: CopyOptions,
) -> Result<SyncReport> {
    let request = SyncRequest {
        images,
        unknown: Vec::new(),
        timeout: Duration::from_mins(1),
        options,
        policy: Policy::default(),
        looks_at_attached: true,
    };
    let sources = sources.into_iter().map(|source| (source.host.clone(), source)).collect();
    let registries = Registries { sources: Sources::Registries(sources), target: Destination::Registry(target) };
    let cancel = CancellationToken::new();
    let report = sync(client, &request, &registries, Fence::Open, Arc::new(Progress::default()), &cancel).await;
    report.context("cancelled")
}

/// One copy of `repository:1` into `to:1`, and of all that is attached to it, with a client of its own.
pub(crate) async fn copy(
    env: &Env,
    source: &Registry,
    target: &Registry,
    repository: &str,
    to: &str,
) -> Result<SyncReport> {
    let (source, target) = (access(env, source)?, access(env, target)?);
    let image = image(&source, repository, to)?;
    sync_images(&client(), vec![source], target, vec![image], CopyOptions::default()).await
}

/// Runs the cases, a few at a time, and fails with all that failed, each with what it is called.
pub(crate) async fn side_by_side<F>(cases: impl IntoIterator<Item = (String, F)>) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    let cases: Vec<_> = cases.into_iter().map(|(what, case)| named(what, case)).collect();
    let total = cases.len();
    let outcomes: Vec<Result<()>> = stream::iter(cases).buffer_unordered(AT_ONCE).collect().await;
    let failed: Vec<String> = outcomes.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
    ensure!(failed.is_empty(), "{} of {total} cases failed:\n{}", failed.len(), failed.join("\n"));
    Ok(())
}

async fn named(what: String, case: impl Future<Output = Result<()>>) -> Result<()> {
    let outcome = tokio::time::timeout(crate::support::PATIENCE, case).await;
    outcome.context("it hangs").and_then(|outcome| outcome).context(what)
}
