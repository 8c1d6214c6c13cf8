//! T5, T12, T15, T16: who writes a manifest wants connections from where we stand, or our memory. Each threat twice:
//! it comes to nothing, and what is like it and honest still works.

use anyhow::{Result, ensure};
use bytes::Bytes;
use imagemirror::{
    reason::Reason,
    registry::{Client, HostOptions, Networks},
};
use serde_json::{Value, json};
use testenv::{
    images::{Content, Image, OCI_INDEX, OCI_MANIFEST},
    proxy::{Action, Matcher, Proxy, Route},
};

use super::{
    auth::bearer,
    bench::{
        Bench, IMAGE, Row,
        Side::{Source, Target},
        client, fault, get_blob, get_manifest, options, put_manifest, row, small, whole,
    },
    listener::{Listener, Relay},
};
use crate::cases::{access, image, sync_with};

pub(super) const BLOCKED: &[Reason] = &[Reason::Blocked];

pub(super) fn rows() -> Vec<Row> {
    [networks(), documents()].into_iter().flatten().collect()
}

/// Everything of this machine is closed but `allow`.
pub(super) fn closed_but(allow: &[&str]) -> Result<Client> {
    let allow = allow.iter().map(|network| network.parse()).collect::<Result<_, _>>()?;
    let mut options = options();
    options.networks = Networks::closed(Vec::new(), allow);
    Ok(Client::new(options))
}

fn networks() -> Vec<Row> {
    let mut rows = vec![
        row("T5-allowed", "what is allowed is reached", |bench| async move {
            let report = bench.copy_with(&closed_but(&["127.0.0.1/32"])?, &bench.to).await?;
            bench.copied(&report, &bench.to, &IMAGE).await
        }),
        row("T5-realm", "a token server in a closed network", closed_realm),
        row("T5-redirect-name", "a redirect to a name in a closed network", closed_name),
    ];
    for (id, host) in [("address", "127.0.0.3"), ("name", "localhost"), ("six", "[::1]")] {
        for is_source in [true, false] {
            let side = if is_source { "source" } else { "target" };
            rows.push(row(&format!("T5-{id}-{side}"), "a registry in a closed network", move |bench| {
                closed(bench, host, is_source)
            }));
        }
    }
    for (id, host) in [
        ("address", "127.0.0.3"),
        ("number", "2130706435"),
        ("hexadecimal", "0x7f.0.0.3"),
        ("short", "127.3"),
        ("mapped", "[::ffff:127.0.0.3]"),
        ("nothing", "0.0.0.0"),
    ] {
        rows.push(row(&format!("T5-redirect-{id}"), "a redirect into a closed network", move |bench| {
            closed_redirect(bench, host)
        }));
    }
    rows
}

async fn closed(bench: Bench, host: &'static str, is_source: bool) -> Result<()> {
    let listener = Listener::at(if host == "127.0.0.3" { host } else { "127.0.0.1" }).await?;
    let there = format!("{host}:{}", listener.port());
    // The other side is at an address that is open.
    let relay = Relay::to(&bench.env.open.host).await?;
    let open = bench.env.open.at(&relay.host());
    let (source, target) = (bench.source.registry().at(&there), bench.target.registry().at(&there));
    let (source, target) = if is_source { (&source, &open) } else { (&open, &target) };
    let report = bench.copy_between(&closed_but(&["127.0.0.2/32"])?, source, target, &bench.to).await?;
    bench.failed(&report, BLOCKED, None).await?;
    ensure!(listener.heard().is_empty(), "a connection came");
    Ok(())
}

async fn closed_redirect(bench: Bench, host: &'static str) -> Result<()> {
    let listener = Listener::at(if host == "0.0.0.0" { "127.0.0.1" } else { "127.0.0.3" }).await?;
    let away = format!("https://{host}:{}/blob", listener.port());
    bench.source.rule(get_blob(small()), Action::respond(307).header("Location", &away));
    let report = bench.copy_with(&closed_but(&["127.0.0.1/32"])?, &bench.to).await?;
    bench.failed(&report, BLOCKED, None).await?;
    ensure!(listener.heard().is_empty(), "a connection came");
    Ok(())
}

async fn closed_realm(bench: Bench) -> Result<()> {
    let listener = Listener::at("127.0.0.3").await?;
    let mut options = options();
    options.networks = Networks::closed(Vec::new(), vec!["127.0.0.1/32".parse()?]);
    let auth_hosts = vec!["127.0.0.3".parse()?];
    options.hosts.insert(bench.target.host().parse()?, HostOptions { auth_hosts, ..HostOptions::default() });
    let challenge = bearer(&format!("https://{}/token", listener.host()));
    bench.target.rule(Matcher::new(), Action::respond(401).header("WWW-Authenticate", &challenge));
    let report = bench.copy_with(&Client::new(options), &bench.to).await?;
    bench.failed(&report, BLOCKED, None).await?;
    ensure!(listener.heard().is_empty(), "a connection came");
    Ok(())
}

/// A registry at an address that is open sends us to a name that is not: both without TLS, as the certificate does not
/// know the address.
async fn closed_name(bench: Bench) -> Result<()> {
    let open = testenv::Client::new(bench.env, &bench.env.open)?;
    open.push(&bench.repository, "1", &IMAGE).await?;
    let source = Proxy::to(bench.env, &bench.env.open).start().await?;
    let listener = Listener::at("127.0.0.1").await?;
    let away = format!("http://localhost:{}/blob", listener.port());
    source.rule(get_blob(small()), Action::respond(307).header("Location", &away));
    let (near, far) = (Relay::to(&source.host()).await?, Relay::to(&bench.env.open.host).await?);
    let (from, into) = (bench.env.open.at(&near.host()), bench.env.open.at(&far.host()));
    let client = closed_but(&["127.0.0.2/32"])?;
    let report = bench.copy_between(&client, &from, &into, &bench.to).await?;
    bench.failed(&report, BLOCKED, None).await?;
    ensure!(open.digest_of(&bench.to, "1").await?.is_none(), "the tag was written");
    ensure!(listener.heard().is_empty(), "a connection came");
    Ok(())
}

fn documents() -> Vec<Row> {
    const REFUSED: &[Reason] = &[Reason::ManifestRefused];
    let manifest: Value = serde_json::from_slice(&IMAGE.root.bytes).unwrap_or_default();
    let with = |key: &str, value: Value| {
        let mut manifest = manifest.clone();
        manifest[key] = value;
        manifest.to_string()
    };
    let sized = |size: Value| {
        let mut manifest = manifest.clone();
        manifest["layers"][1]["size"] = size;
        manifest.to_string()
    };
    let text = manifest.to_string();
    let twice = text.replacen('{', r#"{"layers":[],"#, 1);
    let path = text.replace(&small().digest, "sha256:../../../../etc/passwd");
    let large = text.replacen('{', &format!("{{{}", " ".repeat(4 << 20)), 1);
    let mut rows: Vec<Row> = Vec::new();
    for (id, what, media_type, document, reasons) in [
        ("T12-both", "an index that is an image too", OCI_MANIFEST, with("manifests", json!([])), REFUSED),
        ("T12-twice", "a key that is there twice", OCI_MANIFEST, twice, REFUSED),
        ("T12-type", "a type that the header contradicts", OCI_INDEX, text.clone(), REFUSED),
        ("T12-digest", "a digest that is a path", OCI_MANIFEST, path, REFUSED),
        ("T12-negative", "a size below zero", OCI_MANIFEST, sized(json!(-1)), REFUSED),
        ("T12-list", "a document that is a list", OCI_MANIFEST, "[]".to_owned(), REFUSED),
        ("T15-manifest", "a manifest of more than 4 MiB", OCI_MANIFEST, large, REFUSED),
        ("T15-size", "a size that no blob has", OCI_MANIFEST, sized(json!(1_u64 << 62)), &[Reason::IntegrityError]),
        (
            "T15-size-max",
            "the largest size there is",
            OCI_MANIFEST,
            sized(json!(u64::MAX)),
            &[Reason::IntegrityError, Reason::ManifestRefused],
        ),
    ] {
        let content = Content::new(media_type, document);
        let refused = fault(id, what).at(Source, get_manifest("1").skip(1), whole(200, &content)).fails(reasons).seen(
            Target,
            put_manifest("1"),
            0..=0,
        );
        rows.push(refused.into());
    }
    let long = Action::respond(404).body(Bytes::from(vec![b' '; 1 << 20]));
    rows.push(
        fault("T15-error", "an error that is long")
            .at(Source, get_manifest("1").skip(1), long)
            .fails(&[Reason::SourceNotFound, Reason::SourceUnavailable])
            .into(),
    );
    rows.push(row("T6-body", "an answer of another service is not repeated", reflected));
    rows.push(row("T16-deep", "indexes in indexes, ten deep", |bench| async move {
        let image = (0..10).fold(Image::single(421, &[10]), |image, _| index_of(&image, 1));
        nested(&bench, &image, true).await
    }));
    rows.push(row("T16-wide", "an index that names one child a hundred times", |bench| async move {
        nested(&bench, &index_of(&Image::single(422, &[10]), 100), false).await
    }));
    rows.push(row("T16-both", "indexes of equal children, six deep: each is read once", |bench| async move {
        let image = (0..6).fold(Image::single(423, &[10]), |image, _| index_of(&image, 20));
        nested(&bench, &image, false).await
    }));
    rows
}

/// What is no error of a registry stays where it was read, also in the words of one; what is one is cut.
async fn reflected(bench: Bench) -> Result<()> {
    let (secret, long) = ("the-service-has-said", "word ".repeat(200) + "the-service-has-said");
    let error = |text: &str| json!({"errors": [{"code": "MANIFEST_UNKNOWN", "message": text}]}).to_string();
    for body in [
        secret.to_owned(),
        json!({"token": secret, "message": secret}).to_string(),
        error(&format!("see https://h/?token={secret}")),
        error(&long),
    ] {
        bench.source.clear();
        bench.source.rule(get_manifest("1"), Action::respond(404).body(body.clone()));
        let report = bench.copy().await?;
        let message = report.failed().next().map(|(_, failure)| failure.message.clone()).unwrap_or_default();
        ensure!(message.contains("404") && !message.contains(secret), "{body}: {message}");
        bench.failed(&report, &[Reason::SourceNotFound], None).await?;
    }
    Ok(())
}

/// An index that names the image's root so many times.
fn index_of(image: &Image, times: usize) -> Image {
    let root = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": vec![image.root.descriptor(); times] });
    let manifests = image.manifests.iter().chain([&image.root]).cloned().collect();
    Image { root: Content::new(OCI_INDEX, root.to_string()), manifests, blobs: image.blobs.clone() }
}

async fn nested(bench: &Bench, nested: &Image, is_refused: bool) -> Result<()> {
    let repository = format!("{}/nested", bench.to);
    testenv::Client::new(bench.env, &bench.env.source)?.push(&repository, "1", nested).await?;
    let (source, target) = (access(bench.env, bench.source.registry())?, access(bench.env, bench.target.registry())?);
    let request = image(&source, &repository, &bench.to)?;
    let report = sync_with(&client(), source, target, vec![request]).await?;
    if is_refused {
        bench.failed(&report, &[Reason::ManifestRefused], None).await?;
        return Ok(());
    }
    bench.copied(&report, &bench.to, nested).await?;
    let reads = bench.source.count(&Matcher::new().method("GET").route(Route::Manifest));
    ensure!(reads == nested.manifests.len() + 2, "{reads} reads of {} manifests", nested.manifests.len());
    Ok(())
}
