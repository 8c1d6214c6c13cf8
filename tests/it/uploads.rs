//! How large blobs are sent: in one request or in pieces, as the registry is known or has turned out to want them, and
//! no byte twice that is at the target already.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use imagemirror::{
    copy::Referrers,
    reason::Reason,
    registry::{Client, ClientOptions, HostOptions, Quirks, UploadStrategy},
};
use testenv::{
    Content, Env, Image, Proxy, Registry, RegistryServer,
    proxy::{Action as Do, Close, Exchange, Matcher, Route},
    registry::{
        Kind::{self, Distribution, Distribution2, Olareg},
        RegistryOptions,
    },
};

use crate::direct::{Direct, client_of, prefix};

const KINDS: [Kind; 3] = [Distribution, Distribution2, Olareg];
const MIB: usize = 1 << 20;

/// A target behind a proxy, and the image that goes there.
struct Upload {
    server: RegistryServer,
    proxy: Proxy,
    name: String,
    image: Image,
}

impl Upload {
    async fn new(kind: Kind, (name, image): &(String, Image)) -> Result<Self> {
        let env = Env::get();
        // What distribution holds in memory it copies at every write.
        let options = RegistryOptions { name: format!("{kind:?}"), kind, tls: false, disk: true, ..Default::default() };
        let server = RegistryServer::start(env, options).await?;
        let proxy = Proxy::to(env, server.registry()).start().await?;
        Ok(Self { server, proxy, name: name.clone(), image: image.clone() })
    }

    fn large(&self) -> Result<&Content> {
        self.image.blobs.iter().max_by_key(|blob| blob.bytes.len()).context("no blobs")
    }

    /// The request that commits the large blob, or carries it.
    fn put(&self) -> Result<Matcher> {
        Ok(Matcher::new().method("PUT").route(Route::Upload).reference(&self.large()?.digest))
    }

    async fn copy(&self, client: &Client, source: &Registry, to: &str) -> Result<()> {
        let copy = Direct::of(&format!("{}:1", self.name), &format!("{to}:1")).referrers(Referrers::None).with(client);
        copy.done(source, self.proxy.registry()).await?;
        ensure!(client_of(self.server.registry())?.holds(to, "1", &self.image).await?, "it is not the same");
        ensure!(self.proxy.violations().is_empty(), "{:?}", self.proxy.violations());
        Ok(())
    }

    /// What carried the bytes of the large blob.
    fn sent(&self) -> Result<Vec<Exchange>> {
        let large = &self.large()?.digest;
        let carries = |request: &Exchange| {
            let is_it = request.key.reference.as_ref() == Some(large) || request.key.method == "PATCH";
            request.key.route == Route::Upload && is_it && request.request_bytes > 0
        };
        Ok(self.proxy.requests().into_iter().filter(carries).collect())
    }
}

/// An image with a layer of this size at the source, and what it is called there.
async fn image(size: usize) -> Result<(String, Image)> {
    let (name, image) = (prefix("upload"), Image::single(fastrand::u64(..), &[size]));
    client_of(&Env::get().open)?.push(&name, "1", &image).await?;
    Ok((name, image))
}

fn client_with(registry: &Registry, quirks: Quirks) -> Result<Client> {
    let options = HostOptions { quirks: Some(quirks), ..HostOptions::default() };
    let mut timing = crate::cases::client().timing().clone();
    // Long enough for a registry on a busy machine to take in what was under way when a connection broke.
    timing.backoff_first = Duration::from_millis(200);
    timing.backoff_max = timing.backoff_first;
    let hosts = [(registry.host.parse()?, options)].into();
    Ok(Client::new(ClientOptions { timing, hosts, ..ClientOptions::default() }))
}

fn methods(requests: &[Exchange]) -> Vec<&str> {
    requests.iter().map(|request| request.key.method.as_str()).collect()
}

#[tokio::test]
async fn a_host_gets_large_blobs_as_it_is_configured() -> Result<()> {
    let image = image(3_000_000).await?;
    for kind in KINDS {
        for (strategy, expected) in [
            (UploadStrategy::Put, &["PUT"][..]),
            (UploadStrategy::Patch, &["PATCH"]),
            (UploadStrategy::Chunks(MIB as u64), &["PATCH", "PATCH", "PATCH"]),
        ] {
            let upload = Upload::new(kind, &image).await?;
            let client = client_with(upload.proxy.registry(), Quirks { upload: strategy, ..Quirks::default() })?;
            let what = || format!("{strategy:?} to {kind:?}");
            upload.copy(&client, &Env::get().open, "a").await.with_context(what)?;
            let sent = upload.sent()?;
            ensure!(methods(&sent) == expected, "{}: {sent:#?}", what());
            let bytes: u64 = sent.iter().map(|request| request.request_bytes).sum();
            ensure!(bytes == 3_000_000, "{}: {bytes}", what());
        }
    }
    Ok(())
}

#[tokio::test]
async fn what_is_too_much_at_once_is_sent_in_pieces_from_then_on() -> Result<()> {
    let (first, second) = (image(3_000_000).await?, image(3_000_000).await?);
    for kind in KINDS {
        let mut upload = Upload::new(kind, &first).await?;
        let too_much = || [Do::DiscardRequestBody, Do::respond(413)];
        upload.proxy.rule(upload.put()?.times(1), too_much());
        let client = crate::cases::client();
        let what = || format!("{kind:?}");
        upload.copy(&client, &Env::get().open, "a").await.with_context(what)?;
        ensure!(methods(&upload.sent()?) == ["PUT", "PATCH"], "{kind:?}: {:#?}", upload.sent()?);

        // Learned of the host, not of the blob.
        (upload.name, upload.image) = second.clone();
        upload.proxy.forget();
        upload.copy(&client, &Env::get().open, "b").await.with_context(what)?;
        ensure!(methods(&upload.sent()?) == ["PATCH"], "{kind:?}: {:#?}", upload.sent()?);

        // And chunks that are too large become smaller ones.
        let quirks = Quirks { upload: UploadStrategy::Chunks(4 << 20), ..Quirks::default() };
        upload.proxy.forget();
        upload.proxy.rule(Matcher::new().method("PATCH").route(Route::Upload).times(1), too_much());
        upload.copy(&client_with(upload.proxy.registry(), quirks)?, &Env::get().open, "c").await.with_context(what)?;
        ensure!(methods(&upload.sent()?) == ["PATCH"; 4], "{kind:?}: {:#?}", upload.sent()?);
    }
    Ok(())
}

#[tokio::test]
async fn an_upload_that_breaks_goes_on_where_it_broke() -> Result<()> {
    let image = image(9 * MIB).await?;
    for kind in KINDS {
        for (strategy, close) in [
            (UploadStrategy::Put, Close::Reset),
            (UploadStrategy::Put, Close::Fin),
            (UploadStrategy::Patch, Close::Reset),
            (UploadStrategy::Chunks(8 << 20), Close::Fin),
        ] {
            let upload = Upload::new(kind, &image).await?;
            let source = Proxy::to(Env::get(), &Env::get().open).start().await?;
            let client = client_with(upload.proxy.registry(), Quirks { upload: strategy, ..Quirks::default() })?;
            let breaks = match strategy {
                UploadStrategy::Put => upload.put()?,
                _ => Matcher::new().method("PATCH").route(Route::Upload),
            };
            upload.proxy.rule(breaks.times(1), Do::CutRequestBody { after: 6 << 20, close });
            let what = || format!("{strategy:?} to {kind:?}, {close:?}");
            upload.copy(&client, source.registry(), "a").await.with_context(what)?;
            let bytes: u64 = upload.sent()?.iter().map(|request| request.request_bytes).sum();
            let large = upload.large()?.digest.clone();
            let reads = source.requests().into_iter().filter(|read| read.key.reference.as_ref() == Some(&large));
            let reads: Vec<_> = reads.map(|read| read.range).collect();
            // Distribution 2 knows a session by the number of bytes that the client thinks it has, and so not at all. A
            // reset takes with it what the registry had not read yet.
            let (most, is_continued) = match (kind, close) {
                (Distribution2, _) => (15 << 20, false),
                (_, Close::Reset) => (14 << 20, true),
                (_, Close::Fin) => (11 << 20, true),
            };
            ensure!(bytes <= most, "{}: {bytes} bytes were sent: {:#?}", what(), upload.sent()?);
            ensure!(reads.len() == 2 && reads[1].is_some() == is_continued, "{}: {reads:?}", what());
        }
    }
    Ok(())
}

/// R17, R18: what the registry says it holds counts, and not what was sent.
#[tokio::test]
async fn an_upload_goes_on_from_what_the_registry_says_it_holds() -> Result<()> {
    const CHUNK: u64 = 4 << 20;
    let image = image(9 * MIB).await?;
    let patch = || Matcher::new().method("PATCH").route(Route::Upload);
    let status = || Matcher::new().method("GET").route(Route::Upload);
    let refused = || vec![Do::DiscardRequestBody, Do::respond(416)];
    let cut = || vec![Do::CutRequestBody { after: CHUNK / 2, close: Close::Fin }];
    // How many sessions there are, and the most bytes that are sent.
    for (case, rules, sessions, most) in [
        ("416", vec![(patch().skip(1).times(1), refused())], 1, 13),
        ("416 at the end", vec![(patch().skip(2).times(1), refused())], 1, 10),
        ("416 at once", vec![(patch().times(1), refused())], 2, 13),
        ("cut", vec![(patch().skip(1).times(1), cut())], 1, 11),
        ("a Range that says nothing", vec![(patch().skip(1).times(1), cut()), (status(), vec![says("0-0")])], 2, 15),
        ("no Range", vec![(patch().skip(1).times(1), cut()), (status(), vec![silent()])], 2, 15),
        ("more than there is", vec![(patch().skip(1).times(1), cut()), (status(), vec![says("0-99999999")])], 2, 15),
    ] {
        for kind in [Distribution, Olareg] {
            let upload = Upload::new(kind, &image).await?;
            for (matcher, actions) in rules.clone() {
                upload.proxy.rule(matcher, actions);
            }
            let quirks = Quirks { upload: UploadStrategy::Chunks(CHUNK), ..Quirks::default() };
            let client = client_with(upload.proxy.registry(), quirks)?;
            upload.copy(&client, &Env::get().open, "a").await.with_context(|| format!("{case}, {kind:?}"))?;
            let large = &upload.large()?.digest;
            let starts = upload.proxy.count(&Matcher::new().route(Route::UploadStart).reference(large));
            let bytes: u64 = upload.sent()?.iter().map(|request| request.request_bytes).sum();
            ensure!((starts, bytes <= most << 20) == (sessions, true), "{case}, {kind:?}: {starts}, {bytes}");
        }
    }
    Ok(())
}

fn says(range: &str) -> Do {
    Do::set_header("Range", range)
}

fn silent() -> Do {
    Do::RemoveHeader("range".to_owned())
}

#[tokio::test]
async fn an_upload_that_is_always_refused_ends() -> Result<()> {
    let upload = Upload::new(Distribution, &image(9 * MIB).await?).await?;
    let patch = Matcher::new().method("PATCH").route(Route::Upload);
    upload.proxy.rule(patch.clone().skip(1), [Do::DiscardRequestBody, Do::respond(416)]);
    let quirks = Quirks { upload: UploadStrategy::Chunks(4 << 20), ..Quirks::default() };
    let copy = Direct::of(&format!("{}:1", upload.name), "a:1").referrers(Referrers::None);
    let copy = copy.with(&client_with(upload.proxy.registry(), quirks)?);
    let (reason, message) = copy.fails(&Env::get().open, upload.proxy.registry()).await?;
    ensure!(reason == Reason::TargetUnavailable && message.contains("416"), "{reason}: {message}");
    let starts = Matcher::new().route(Route::UploadStart).reference(&upload.large()?.digest);
    ensure!(upload.proxy.count(&starts) <= 4 && upload.proxy.count(&patch) <= 12, "{:#?}", upload.sent()?);
    Ok(())
}

#[tokio::test]
async fn an_upload_goes_on_after_its_source_was_left_alone() -> Result<()> {
    let image = image(9 * MIB).await?;
    for kind in [Distribution, Olareg] {
        let upload = Upload::new(kind, &image).await?;
        let source = Proxy::to(Env::get(), &Env::get().open).start().await?;
        let read = Matcher::new().method("GET").route(Route::Blob).reference(&upload.large()?.digest);
        source.rule(read.clone().times(1), Do::CutResponseBody { after: 6 << 20, close: Close::Fin });
        source.rule(read.clone().times(1), Do::respond(429).header("Retry-After", "1"));
        let mut options = crate::cases::options();
        options.timing.hold = Duration::from_millis(100);
        upload.copy(&Client::new(options), source.registry(), "a").await.with_context(|| format!("{kind:?}"))?;
        let (reads, sent) = (source.count(&read), upload.sent()?);
        let bytes: u64 = sent.iter().map(|request| request.request_bytes).sum();
        // A registry that is busy may say that less has arrived than was sent; from the beginning it never goes.
        let goes_on = (3..=4).contains(&reads) && sent.len() == 2 && bytes <= 17 << 20;
        ensure!(goes_on, "{kind:?}: {reads} reads, {bytes}: {sent:#?}");
        let starts = Matcher::new().method("POST").route(Route::UploadStart).reference(&upload.large()?.digest);
        ensure!(upload.proxy.count(&starts) == 1, "{kind:?}: another session");
    }
    Ok(())
}

#[tokio::test]
async fn a_session_that_is_lost_begins_again() -> Result<()> {
    let image = image(9 * MIB).await?;
    for kind in KINDS {
        let upload = Upload::new(kind, &image).await?;
        upload.proxy.rule(upload.put()?.times(1), Do::CutRequestBody { after: 6 << 20, close: Close::Reset });
        upload.proxy.rule(Matcher::new().method("GET").route(Route::Upload), Do::respond(404));
        upload.copy(&crate::cases::client(), &Env::get().open, "a").await.with_context(|| format!("{kind:?}"))?;
        let starts = upload.proxy.count(&Matcher::new().method("POST").route(Route::UploadStart));
        ensure!(starts == upload.image.blobs.len() + 1, "{kind:?}: {starts}");
    }
    Ok(())
}

#[tokio::test]
async fn what_a_host_discards_is_not_asked_for() -> Result<()> {
    let upload = Upload::new(Distribution, &image(9 * MIB).await?).await?;
    let client = client_with(upload.proxy.registry(), Quirks { resumes_uploads: false, ..Quirks::default() })?;
    upload.proxy.rule(upload.put()?.times(1), Do::CutRequestBody { after: 6 << 20, close: Close::Reset });
    upload.copy(&client, &Env::get().open, "a").await?;
    let bytes: u64 = upload.sent()?.iter().map(|request| request.request_bytes).sum();
    ensure!(bytes == 15 << 20, "{bytes}");
    Ok(())
}

#[tokio::test]
async fn chunks_are_as_large_as_the_registry_wants_them_at_least() -> Result<()> {
    let upload = Upload::new(Distribution, &image(5 * MIB).await?).await?;
    let start = Matcher::new().method("POST").route(Route::UploadStart);
    upload.proxy.rule(start, Do::set_header("OCI-Chunk-Min-Length", "2097152"));
    let quirks = Quirks { upload: UploadStrategy::Chunks(MIB as u64), ..Quirks::default() };
    upload.copy(&client_with(upload.proxy.registry(), quirks)?, &Env::get().open, "a").await?;
    let sizes: Vec<u64> = upload.sent()?.iter().map(|request| request.request_bytes).collect();
    ensure!(sizes == [2 << 20, 2 << 20, 1 << 20], "{sizes:?}");
    Ok(())
}
