//! T4: layers that a manifest says are to be had elsewhere. Who writes it wants a connection, or a credential, and whoever
//! is elsewhere may send what it likes.

use anyhow::{Context as _, Result, ensure};
use imagemirror::{
    copy::{CopyOptions, ForeignLayers, Referrers},
    reason::Reason,
    registry::Client,
    sync::SyncReport,
};
use serde_json::{Value, json};
use testenv::{
    images::{Content, DOCKER_MANIFEST, OCI_MANIFEST},
    proxy::{Action, Close, Matcher, Route},
};

use super::{
    bench::{Bench, IMAGE, Row, client, cut, get_blob, large, lines, put_manifest, refusal, row, small, whole},
    listener::Listener,
    threats::{BLOCKED, closed_but},
};
use crate::cases::{access, image, sync_images};

const NONDISTRIBUTABLE: &str = "application/vnd.oci.image.layer.nondistributable.v1.tar";

pub(super) fn rows() -> Vec<Row> {
    [skipped(), copied(), refused()].into_iter().flatten().collect()
}

fn skipped() -> Vec<Row> {
    const DOCKER_FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
    vec![
        row("T4", "a layer that its vendor distributes is left out", |bench| {
            foreign_layer(bench, NONDISTRIBUTABLE, false)
        }),
        row("T4-docker", "the same in Docker's words", |bench| foreign_layer(bench, DOCKER_FOREIGN, false)),
        row("T4-layer", "a layer like any other that names URLs comes from the registry", |bench| {
            foreign_layer(bench, LAYER, true)
        }),
        row("T4-refused", "a target that takes no manifest with URLs says which setting it is", refused_urls),
    ]
}

/// The image with these `urls` on one of its layers, under a type of its own.
fn with_urls(blob: &Content, media_type: &str, urls: &[String]) -> Content {
    let mut manifest: Value = serde_json::from_slice(&IMAGE.root.bytes).unwrap_or_default();
    let is_docker = media_type.contains("docker");
    if is_docker {
        manifest["mediaType"] = DOCKER_MANIFEST.into();
        manifest["config"]["mediaType"] = "application/vnd.docker.container.image.v1+json".into();
        manifest["layers"][0]["mediaType"] = "application/vnd.docker.image.rootfs.diff.tar".into();
    }
    for layer in manifest["layers"].as_array_mut().into_iter().flatten() {
        if layer["digest"] == blob.digest {
            layer["mediaType"] = media_type.into();
            layer["urls"] = json!(urls);
        }
    }
    Content::new(if is_docker { DOCKER_MANIFEST } else { OCI_MANIFEST }, manifest.to_string())
}

fn urls_at(listener: &Listener) -> [String; 2] {
    ["http", "https"].map(|scheme| format!("{scheme}://{}/layer", listener.host()))
}

async fn foreign_layer(bench: Bench, media_type: &'static str, is_copied: bool) -> Result<()> {
    let bench = bench.writing_free().await?;
    let listener = Listener::at("127.0.0.1").await?;
    let root = with_urls(small(), media_type, &urls_at(&listener));
    bench.source.rule(Matcher::new().route(Route::Manifest).skip(1), whole(200, &root));
    let report = bench.copy().await?;
    ensure!(report.failed().next().is_none(), "{report:?}");
    ensure!(listener.heard().is_empty(), "its URL was asked");
    let there = bench.at_target()?.blob(&bench.to, &small().digest).await?;
    ensure!(there.is_some() == is_copied, "the layer is at the target: {}", there.is_some());
    ensure!(bench.at_target()?.digest_of(&bench.to, "1").await? == Some(root.digest), "the tag is another one");
    bench.in_order()
}

async fn refused_urls(bench: Bench) -> Result<()> {
    let listener = Listener::at("127.0.0.1").await?;
    let root = with_urls(small(), NONDISTRIBUTABLE, &urls_at(&listener));
    bench.source.rule(Matcher::new().route(Route::Manifest).skip(1), whole(200, &root));
    let report = bench.copy().await?;
    bench.failed(&report, &[Reason::ManifestRefused], None).await?;
    ensure!(listener.heard().is_empty(), "its URL was asked");
    let names_setting = report.failed().all(|(_, failure)| failure.message.contains("validation.manifests.urls.allow"));
    ensure!(names_setting, "{report:?}");
    ensure!(bench.target.count(&put_manifest("1")) == 1, "{}", lines(&bench.target));
    Ok(())
}

/// A layer that is wanted: what its manifest says of where it is, given the URL where it is, what the vendor does there,
/// and what comes of it.
struct Wanted {
    id: &'static str,
    what: &'static str,
    blob: &'static Content,
    urls: fn(String) -> Vec<String>,
    vendor: Option<Action>,
    /// None: it is copied.
    reasons: &'static [Reason],
    /// How often the vendor is asked.
    asked: usize,
}

/// Part of a URL that nobody else is told.
const CANARY: &str = "signature=canary";

fn wanted(id: &'static str, what: &'static str) -> Wanted {
    Wanted { id, what, blob: small(), urls: |url| vec![url], vendor: None, reasons: &[], asked: 1 }
}

fn copied() -> Vec<Row> {
    let away = |url: &str| Action::respond(307).header("Location", url);
    let all = [
        wanted("T4-copy", "a layer that the registry does not have comes from its vendor"),
        Wanted {
            urls: |url| vec![url.replace(CANARY, "").replace("sha256:", "sha256:0"), url],
            asked: 2,
            ..wanted("T4-copy-second", "or from the second of its URLs")
        },
        Wanted {
            urls: |url| vec!["https://127.0.0.1:1/layer".into(), "https://layers.invalid/layer".into(), url],
            ..wanted("T4-copy-down", "the same where nobody answers at the others")
        },
        Wanted {
            urls: |url| vec![url.replace("https", "http"), url],
            ..wanted("T4-copy-schemes", "what is not HTTPS is left out")
        },
        Wanted { vendor: Some(away("?again")), asked: 2, ..wanted("T4-copy-redirect", "a vendor may send us on") },
        Wanted {
            blob: large(),
            vendor: Some(cut(500_000, Close::Fin)),
            asked: 2,
            ..wanted("T4-copy-cut", "a layer that breaks off is continued")
        },
    ];
    let mut rows: Vec<Row> = all.map(Row::from).into();
    rows.push(row("T4-copy-there", "a layer that the registry has comes from the registry", there));
    rows
}

fn refused() -> Vec<Row> {
    const WRONG: &[Reason] = &[Reason::IntegrityError];
    const NOWHERE: &[Reason] = &[Reason::SourceIncomplete];
    let login = Action::respond(401).header("WWW-Authenticate", "Basic realm=\"vendor\"");
    let all = [
        Wanted {
            vendor: Some(Action::FlipByte { at: 100 }),
            reasons: WRONG,
            asked: 2,
            ..wanted("T4-wrong", "other bytes than the digest says")
        },
        Wanted {
            vendor: Some(Action::append_body("more")),
            reasons: WRONG,
            asked: 2,
            ..wanted("T4-longer", "more bytes than the size says")
        },
        Wanted {
            vendor: Some(login),
            reasons: NOWHERE,
            ..wanted("T4-login", "a vendor that asks for a login gets none")
        },
        Wanted { vendor: Some(Action::respond(404)), reasons: NOWHERE, ..wanted("T4-gone", "a layer that is nowhere") },
        Wanted {
            urls: |url| vec![url.replace("https", "http")],
            reasons: NOWHERE,
            asked: 0,
            ..wanted("T4-plain", "a layer that is to be had without TLS alone")
        },
    ];
    let mut rows: Vec<Row> = all.map(Row::from).into();
    rows.push(row("T4-closed", "a layer in a closed network", in_closed_network));
    rows
}

impl From<Wanted> for Row {
    fn from(wanted: Wanted) -> Self {
        row(wanted.id, wanted.what, move |bench| wanted.run(bench))
    }
}

impl Wanted {
    async fn run(self, bench: Bench) -> Result<()> {
        let bench = bench.writing_free().await?;
        let vendor = bench.listener().await?;
        let url = format!("{}/v2/{}/blobs/{}?{CANARY}", vendor.url(), bench.repository, self.blob.digest);
        // What breaks off does so once.
        let times = if self.reasons.is_empty() { 1 } else { u32::MAX };
        self.vendor
            .into_iter()
            .for_each(|action| vendor.rule(Matcher::new().path_contains(CANARY).times(times), action));
        let (root, report) = copy_foreign(&bench, &client(), self.blob, &(self.urls)(url)).await?;
        let asked = vendor.requests();
        ensure!(asked.len() == self.asked, "the vendor was asked {} times:{}", asked.len(), lines(&vendor));
        ensure!(asked.iter().all(|request| !request.authorized), "it was sent a credential:{}", lines(&vendor));
        // The registry each time first: it may have got it meanwhile.
        let first =
            bench.source.requests().into_iter().filter(|read| get_blob(self.blob).matches(&read.key, &read.path));
        let first: Vec<_> = first.map(|read| read.status).collect();
        ensure!(!first.is_empty() && first.iter().all(|status| *status == Some(404)), "{}", lines(&bench.source));
        if self.reasons.is_empty() {
            ensure!(report.failed().next().is_none(), "{report:?}");
            let found = bench.at_target()?.blob(&bench.to, &self.blob.digest).await?;
            ensure!(found.as_ref() == Some(&self.blob.bytes), "the layer is not at the target");
            ensure!(bench.at_target()?.digest_of(&bench.to, "1").await? == Some(root.digest), "the tag is another one");
            ensure!(self.asked == 1 || asked[1].range.is_some() == (self.blob == large()), "{asked:?}");
            return bench.in_order();
        }
        bench.failed(&report, self.reasons, None).await?;
        let (_, failure) = report.failed().next().context("it did not fail")?;
        ensure!(!failure.message.contains("canary"), "{failure:?}");
        // Not the registry: it is the vendor that does not have it, or wants a login.
        let is_of_vendor = self.asked == 0 || failure.message.contains(&vendor.host());
        ensure!(is_of_vendor || self.reasons == [Reason::IntegrityError], "{failure:?}");
        Ok(())
    }
}

/// The manifest names `urls` for a layer that the source does not have, and the layer is wanted.
async fn copy_foreign(
    bench: &Bench,
    client: &Client,
    blob: &Content,
    urls: &[String],
) -> Result<(Content, SyncReport)> {
    bench.source.rule(get_blob(blob), refusal(404, "BLOB_UNKNOWN"));
    copy_wanted(bench, client, blob, urls).await
}

async fn copy_wanted(bench: &Bench, client: &Client, blob: &Content, urls: &[String]) -> Result<(Content, SyncReport)> {
    let root = with_urls(blob, NONDISTRIBUTABLE, urls);
    bench.source.rule(Matcher::new().route(Route::Manifest).skip(1), whole(200, &root));
    let (source, target) = (access(bench.env, bench.source.registry())?, access(bench.env, bench.target.registry())?);
    let image = image(&source, &bench.repository, &bench.to)?;
    let options = CopyOptions { foreign_layers: ForeignLayers::Copy, referrers: Referrers::None };
    Ok((root, sync_images(client, vec![source], target, vec![image], options).await?))
}

async fn there(bench: Bench) -> Result<()> {
    let bench = bench.writing_free().await?;
    let listener = Listener::at("127.0.0.1").await?;
    let (root, report) = copy_wanted(&bench, &client(), small(), &urls_at(&listener)).await?;
    ensure!(report.failed().next().is_none(), "{report:?}");
    ensure!(listener.heard().is_empty(), "its URL was asked");
    ensure!(bench.at_target()?.blob(&bench.to, &small().digest).await?.is_some(), "the layer is not at the target");
    ensure!(bench.at_target()?.digest_of(&bench.to, "1").await? == Some(root.digest), "the tag is another one");
    bench.in_order()
}

async fn in_closed_network(bench: Bench) -> Result<()> {
    let bench = bench.writing_free().await?;
    let listener = Listener::at("127.0.0.3").await?;
    let client = closed_but(&["127.0.0.1/32"])?;
    let (_, report) = copy_foreign(&bench, &client, small(), &urls_at(&listener)).await?;
    bench.failed(&report, BLOCKED, None).await?;
    ensure!(listener.heard().is_empty(), "a connection came");
    Ok(())
}
