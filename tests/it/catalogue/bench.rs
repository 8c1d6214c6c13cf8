//! What every row has: an image at the source, a proxy on each side, a repository of its own at the target. And the
//! form that most rows have: faults at requests, what the copy comes to, how often which request is seen.

use std::{
    ops::RangeInclusive,
    sync::{Arc, LazyLock},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use futures::future::LocalBoxFuture;
use imagemirror::{
    reason::Reason,
    registry::{Client, ClientOptions, Timing},
    sync::SyncReport,
};
use serde_json::json;
use testenv::{
    Env, Registry, RegistryOptions, RegistryServer,
    images::{Content, Image},
    proxy::{Action, Close, Exchange, Matcher, Proxy, Route},
};

use crate::cases::{access, image, prefix, sync_with};

pub(super) const LARGE: usize = 1_300_000;
const SMALL: usize = 3_000;
/// No row is worth more requests to one side.
const PATIENT_WITH: usize = 60;

/// A configuration, a layer that is streamed, one that is held in memory.
pub(super) static IMAGE: LazyLock<Image> = LazyLock::new(|| Image::single(401, &[LARGE, SMALL]));
pub(super) static INDEX: LazyLock<Image> =
    LazyLock::new(|| Image::multi_arch(402, &[SMALL], &["linux/amd64", "linux/arm64"]));
/// What the target has before.
pub(super) static OLD: LazyLock<Image> = LazyLock::new(|| Image::single(403, &[10]));

/// Times in which whatever is not meant to be slow has an answer, also on a busy machine.
pub(super) fn options() -> ClientOptions {
    options_with(Duration::from_secs(15))
}

fn options_with(patience: Duration) -> ClientOptions {
    let mut options = crate::cases::options();
    be_patient(&mut options.timing, patience);
    options
}

fn be_patient(timing: &mut Timing, patience: Duration) {
    (timing.head, timing.idle, timing.answer) = (patience, patience, patience);
}

pub(super) fn client() -> Client {
    Client::new(options())
}

pub(super) fn large() -> &'static Content {
    layer(LARGE)
}

pub(super) fn small() -> &'static Content {
    layer(SMALL)
}

#[allow(clippy::unwrap_used, reason = "the image is made with these layers")]
fn layer(size: usize) -> &'static Content {
    IMAGE.blobs.iter().find(|blob| blob.bytes.len() == size).unwrap()
}

/// What all rows share.
pub(super) struct World {
    pub(super) env: &'static Env,
    /// TLS, no authentication, relative locations; takes manifests with `urls`.
    pub(super) free: RegistryServer,
    prefix: String,
}

impl World {
    pub(super) async fn start() -> Result<Self> {
        let env = crate::cases::env();
        let extra = json!({
            "http": { "relativeurls": true },
            "validation": { "manifests": { "urls": { "allow": [".*"] } } },
        });
        let options = RegistryOptions { name: "free".to_owned(), extra, ..RegistryOptions::default() };
        let world = Self { env, free: RegistryServer::start(env, options).await?, prefix: prefix("catalogue") };
        for registry in [&env.source, &env.target, world.free.registry()] {
            let client = testenv::Client::new(env, registry)?;
            client.push(&world.source_of("image"), "1", &IMAGE).await?;
            client.push(&world.source_of("index"), "1", &INDEX).await?;
        }
        Ok(world)
    }

    fn source_of(&self, image: &str) -> String {
        format!("{}/{image}", self.prefix)
    }
}

/// What one row works with.
pub(super) struct Bench {
    pub(super) world: Arc<World>,
    pub(super) env: &'static Env,
    pub(super) source: Proxy,
    pub(super) target: Proxy,
    /// At the source.
    pub(super) repository: String,
    /// At the target.
    pub(super) to: String,
}

impl Bench {
    pub(super) async fn new(world: Arc<World>, number: usize) -> Result<Self> {
        let env = world.env;
        let source = Proxy::to(env, &env.source).label("source").start().await?;
        let target = Proxy::to(env, &env.target).label("target").start().await?;
        let (repository, to) = (world.source_of("image"), world.source_of(&format!("row-{number}")));
        Ok(Self { world, env, source, target, repository, to })
    }

    /// Reads from the registry with tokens.
    pub(super) async fn reading_tokens(mut self) -> Result<Self> {
        self.source = Proxy::to(self.env, &self.env.target).label("source").start().await?;
        Ok(self)
    }

    /// Writes to the registry that everybody may write to.
    pub(super) async fn writing_free(mut self) -> Result<Self> {
        self.target = self.listener().await?;
        Ok(self)
    }

    pub(super) fn of_index(mut self) -> Self {
        self.repository = self.world.source_of("index");
        self
    }

    /// Copies another image, which is at the source alone.
    pub(super) async fn of(mut self, image: &Image) -> Result<Self> {
        self.repository = self.beside("from");
        testenv::Client::new(self.env, &self.env.source)?.push(&self.repository, "1", image).await?;
        Ok(self)
    }

    /// Another host: what is at the source is there as well, for everybody.
    pub(super) async fn listener(&self) -> Result<Proxy> {
        Proxy::to(self.env, self.world.free.registry()).label("listener").start().await
    }

    /// A repository at the target beside the row's own.
    pub(super) fn beside(&self, name: &str) -> String {
        format!("{}/{name}", self.to)
    }

    /// One copy with a client of its own.
    pub(super) async fn copy(&self) -> Result<SyncReport> {
        self.copy_with(&client(), &self.to).await
    }

    pub(super) async fn copy_with(&self, client: &Client, to: &str) -> Result<SyncReport> {
        self.copy_between(client, self.source.registry(), self.target.registry(), to).await
    }

    pub(super) async fn copy_between(
        &self,
        client: &Client,
        source: &Registry,
        target: &Registry,
        to: &str,
    ) -> Result<SyncReport> {
        let (source, target) = (access(self.env, source)?, access(self.env, target)?);
        let image = image(&source, &self.repository, to)?;
        sync_with(client, source, target, vec![image]).await
    }

    /// A judge of what is at the target, past the faults.
    pub(super) fn at_target(&self) -> Result<testenv::Client> {
        let free = self.target.registry().username.is_none();
        testenv::Client::new(self.env, if free { self.world.free.registry() } else { &self.env.target })
    }

    pub(super) async fn push_old(&self) -> Result<()> {
        self.at_target()?.push(&self.to, "1", &OLD).await
    }

    /// The report is of a copy that went well, in order, and the target holds the image.
    pub(super) async fn copied(&self, report: &SyncReport, to: &str, image: &Image) -> Result<()> {
        self.holds(report, to, image).await?;
        self.in_order()
    }

    /// The same, in whatever order.
    async fn holds(&self, report: &SyncReport, to: &str, image: &Image) -> Result<()> {
        if let Some((_, failure)) = report.failed().next() {
            anyhow::bail!("{}: {}", failure.reason, failure.message);
        }
        ensure!(self.at_target()?.holds(to, "1", image).await?, "the target does not hold the image");
        Ok(())
    }

    /// The report is of a copy that failed for one of these reasons, and the tag is what it was.
    pub(super) async fn failed(&self, report: &SyncReport, reasons: &[Reason], tag: Option<&str>) -> Result<()> {
        let found = self.at_target()?.digest_of(&self.to, "1").await?;
        ensure!(found.as_deref() == tag, "the tag is {found:?}");
        let (_, failure) = report.failed().next().context("it was taken for good")?;
        ensure!(reasons.contains(&failure.reason), "{} and not {reasons:?}: {}", failure.reason, failure.message);
        self.in_order()
    }

    fn side(&self, side: Side) -> &Proxy {
        if side == Side::Source { &self.source } else { &self.target }
    }

    /// No manifest was put before its children.
    pub(super) fn in_order(&self) -> Result<()> {
        let violations = self.target.violations();
        ensure!(violations.is_empty(), "{violations:?}");
        Ok(())
    }
}

/// Which of the two proxies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Target,
}

/// One row of the catalogue.
pub(crate) struct Row {
    pub(crate) id: String,
    pub(super) what: String,
    pub(super) run: Box<dyn FnOnce(Bench) -> LocalBoxFuture<'static, Result<()>>>,
}

/// A row that tells its own story.
pub(super) fn row<F>(id: &str, what: &str, run: impl FnOnce(Bench) -> F + 'static) -> Row
where
    F: Future<Output = Result<()>> + 'static,
{
    Row { id: id.to_owned(), what: what.to_owned(), run: Box::new(move |bench| Box::pin(run(bench))) }
}

/// A row of faults at requests of one copy. What is not said: the image goes to an empty repository and arrives.
pub(super) struct Fault {
    id: String,
    what: String,
    rules: Vec<(Side, Matcher, Action)>,
    is_index: bool,
    has_tokens: bool,
    before: Option<&'static LazyLock<Image>>,
    reasons: &'static [Reason],
    seen: Vec<(Side, Matcher, RangeInclusive<usize>)>,
    most_sent: Option<u64>,
    options: ClientOptions,
    in_any_order: bool,
}

pub(super) fn fault(id: &str, what: &str) -> Fault {
    Fault {
        id: id.to_owned(),
        what: what.to_owned(),
        rules: Vec::new(),
        is_index: false,
        has_tokens: false,
        before: None,
        reasons: &[],
        seen: Vec::new(),
        most_sent: None,
        options: options(),
        in_any_order: false,
    }
}

impl Fault {
    pub(super) fn at(mut self, side: Side, matcher: Matcher, action: Action) -> Self {
        self.rules.push((side, matcher, action));
        self
    }

    /// The image with an index.
    pub(super) fn index(self) -> Self {
        Self { is_index: true, ..self }
    }

    /// The source asks for tokens.
    pub(super) fn tokens(self) -> Self {
        Self { has_tokens: true, ..self }
    }

    /// The target has another image under the tag, so that the source is asked with HEAD first.
    pub(super) fn old(self) -> Self {
        Self { before: Some(&OLD), ..self }
    }

    /// The copy fails for one of these reasons and the tag stays.
    pub(super) fn fails(self, reasons: &'static [Reason]) -> Self {
        Self { reasons, ..self }
    }

    /// How many requests match, those without a credential that are answered 401 aside.
    pub(super) fn seen(mut self, side: Side, matcher: Matcher, count: RangeInclusive<usize>) -> Self {
        self.seen.push((side, matcher, count));
        self
    }

    /// No byte of the large layer is sent twice.
    pub(super) fn sent_once(self) -> Self {
        Self { most_sent: Some(LARGE as u64), ..self }
    }

    /// How long the client waits for an answer or a byte.
    pub(super) fn patience(self, patience: Duration) -> Self {
        self.timing(|timing| be_patient(timing, patience))
    }

    /// What else the client waits for.
    pub(super) fn timing(mut self, change: impl FnOnce(&mut Timing)) -> Self {
        change(&mut self.options.timing);
        self
    }

    /// The target says that it has what it has not.
    pub(super) fn in_any_order(self) -> Self {
        Self { in_any_order: true, ..self }
    }

    async fn run(self, bench: Bench) -> Result<()> {
        let bench = if self.is_index { bench.of_index() } else { bench };
        let bench = if self.has_tokens { bench.reading_tokens().await? } else { bench };
        for (at, matcher, action) in &self.rules {
            bench.side(*at).rule(matcher.clone(), action.clone());
        }
        if self.before.is_some() {
            bench.push_old().await?;
        }
        let report = bench.copy_with(&Client::new(self.options.clone()), &bench.to).await?;
        let checked = self.check(&bench, &report).await;
        checked
            .map_err(|error| anyhow!("{error:#}\n  source:{}\n  target:{}", lines(&bench.source), lines(&bench.target)))
    }

    async fn check(&self, bench: &Bench, report: &SyncReport) -> Result<()> {
        if self.reasons.is_empty() {
            bench.holds(report, &bench.to, if self.is_index { &INDEX } else { &IMAGE }).await?;
        } else {
            bench.failed(report, self.reasons, self.before.map(|image| image.digest())).await?;
        }
        if !self.in_any_order {
            bench.in_order()?;
        }
        for (at, matcher, wanted) in &self.seen {
            let seen = bench.side(*at).requests();
            let count = seen.iter().filter(|exchange| is_seen(matcher, exchange)).count();
            ensure!(wanted.contains(&count), "{count} and not {wanted:?} of {matcher:?}");
        }
        if let Some(most) = self.most_sent {
            let sent = bytes_sent(&bench.target, large());
            ensure!(sent <= most, "{sent} bytes of {most} were sent");
        }
        for proxy in [&bench.source, &bench.target] {
            let count = proxy.requests().len();
            ensure!(count <= PATIENT_WITH, "{count} requests");
        }
        Ok(())
    }
}

impl From<Fault> for Row {
    fn from(fault: Fault) -> Self {
        row(&fault.id.clone(), &fault.what.clone(), move |bench| fault.run(bench))
    }
}

fn is_seen(matcher: &Matcher, exchange: &Exchange) -> bool {
    let is_first_contact = !exchange.authorized && exchange.actions.is_empty();
    matcher.matches(&exchange.key, &exchange.path) && !is_first_contact
}

pub(super) fn bytes_sent(target: &Proxy, blob: &Content) -> u64 {
    let puts = put_blob(blob);
    let requests = target.requests();
    requests.iter().filter(|put| puts.matches(&put.key, &put.path)).map(|put| put.request_bytes).sum()
}

/// What went through a proxy, for the reader of a failure.
pub(super) fn lines(proxy: &Proxy) -> String {
    let line = |exchange: &Exchange| {
        let range = exchange.range.as_deref().unwrap_or_default();
        format!("\n    {} {:?} {range}", exchange.key, exchange.status)
    };
    proxy.requests().iter().map(line).collect()
}

pub(super) fn get_blob(blob: &Content) -> Matcher {
    Matcher::new().method("GET").route(Route::Blob).reference(&blob.digest)
}

pub(super) fn get_manifest(reference: &str) -> Matcher {
    Matcher::new().method("GET").route(Route::Manifest).reference(reference)
}

pub(super) fn head_manifest() -> Matcher {
    Matcher::new().method("HEAD").route(Route::Manifest)
}

pub(super) fn post() -> Matcher {
    Matcher::new().method("POST").route(Route::UploadStart)
}

pub(super) fn post_blob(blob: &Content) -> Matcher {
    post().reference(&blob.digest)
}

pub(super) fn put_blobs() -> Matcher {
    Matcher::new().method("PUT").route(Route::Upload)
}

pub(super) fn put_blob(blob: &Content) -> Matcher {
    put_blobs().reference(&blob.digest)
}

pub(super) fn put_manifest(reference: &str) -> Matcher {
    Matcher::new().method("PUT").route(Route::Manifest).reference(reference)
}

pub(super) fn cancel() -> Matcher {
    Matcher::new().method("DELETE").route(Route::Upload)
}

pub(super) fn cut(after: u64, close: Close) -> Action {
    Action::CutResponseBody { after, close }
}

/// The whole of it, as it should be.
pub(super) fn whole(status: u16, content: &Content) -> Action {
    Action::respond(status).header("Content-Type", &content.media_type).body(content.bytes.clone())
}

/// An error as registries send them.
pub(super) fn refusal(status: u16, code: &str) -> Action {
    Action::respond(status).body(json!({ "errors": [{ "code": code, "message": "injected" }] }).to_string())
}
