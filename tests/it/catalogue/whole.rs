//! R27 to R33, R35, R37, R38: tags that move, parts that are missing, names and certificates, mirrors of mirrors.

use std::ops::Range;

use anyhow::{Context as _, Result, ensure};
use imagemirror::{reason::Reason, registry::Access, sync::Failure};
use testenv::{
    certs::Ca,
    images::Image,
    proxy::{Action, Gate, Matcher, Proxy, Route},
};

use super::{
    bench::{
        Bench, IMAGE, INDEX, OLD, Row,
        Side::{Source, Target},
        client, fault, get_blob, get_manifest, head_manifest, large, lines, post, put_blobs, put_manifest, refusal,
        row,
    },
    listener::{Listener, Relay},
};
use crate::cases::{access, image, sync_from, sync_with};

const HTML: &str = "<!DOCTYPE html><title>Sign in to the network</title>";

pub(super) fn rows() -> Vec<Row> {
    [tags(), incomplete(), pages(), names(), circles()].into_iter().flatten().collect()
}

fn tags() -> Vec<Row> {
    vec![
        row("R27", "a tag that moves during the copy: the run ends with what it began with", |bench| {
            moves(bench, false)
        }),
        row("R27-update", "the same where the target has an older image", |bench| moves(bench, true)),
        row("R28", "a tag that is deleted at the source stays at the target", deleted),
        fault("R28-never", "a tag that never was")
            .at(Source, get_manifest("1").skip(1), refusal(404, "MANIFEST_UNKNOWN"))
            .fails(&[Reason::SourceNotFound])
            .seen(Source, get_manifest("1"), 1..=1)
            .seen(Target, post(), 0..=0)
            .into(),
        fault("R28-repository", "a repository that is gone")
            .old()
            .at(Source, head_manifest().skip(1), Action::respond(404))
            .at(Source, get_manifest("1"), refusal(404, "NAME_UNKNOWN"))
            .fails(&[Reason::SourceNotFound])
            .seen(Target, put_manifest("1"), 0..=0)
            .into(),
    ]
}

async fn moves(mut bench: Bench, has_old: bool) -> Result<()> {
    bench.repository = format!("{}/moving", bench.to);
    let at_source = testenv::Client::new(bench.env, &bench.env.source)?;
    at_source.push(&bench.repository, "1", &IMAGE).await?;
    if has_old {
        bench.push_old().await?;
    }
    let gate = Gate::new();
    bench.source.rule(get_blob(large()), Action::Gate(gate.clone()));
    let next = Image::single(411, &[20]);
    let move_it = async {
        gate.arrived(1).await?;
        at_source.push(&bench.repository, "1", &next).await?;
        gate.open();
        anyhow::Ok(())
    };
    let (report, moved) = tokio::join!(bench.copy(), move_it);
    moved?;
    bench.copied(&report?, &bench.to, &IMAGE).await?;
    let report = bench.copy().await?;
    bench.copied(&report, &bench.to, &next).await
}

async fn deleted(mut bench: Bench) -> Result<()> {
    bench.repository = format!("{}/leaving", bench.to);
    let at_source = testenv::Client::new(bench.env, &bench.env.source)?;
    at_source.push(&bench.repository, "1", &IMAGE).await?;
    let report = bench.copy().await?;
    bench.copied(&report, &bench.to, &IMAGE).await?;
    at_source.delete(&bench.repository, "1").await?;
    bench.target.forget();
    let report = bench.copy().await?;
    bench.failed(&report, &[Reason::SourceNotFound], Some(IMAGE.digest())).await?;
    ensure!(bench.at_target()?.holds(&bench.to, "1", &IMAGE).await?, "the copy is gone");
    let reads = bench.target.requests().iter().all(|exchange| matches!(exchange.key.method.as_str(), "HEAD" | "GET"));
    ensure!(reads, "{}", lines(&bench.target));
    Ok(())
}

fn incomplete() -> Vec<Row> {
    const MISSING: &[Reason] = &[Reason::SourceIncomplete];
    let child = &INDEX.manifests[1].digest;
    let rows = [
        fault("R29-child", "an index whose child is missing")
            .index()
            .at(Source, get_manifest(child), refusal(404, "MANIFEST_UNKNOWN"))
            .fails(MISSING)
            .seen(Source, get_manifest(child), 1..=2)
            .seen(Target, put_manifest("1"), 0..=0),
        fault("R29-child-bare", "the same without a word")
            .index()
            .old()
            .at(Source, get_manifest(child), Action::respond(404))
            .fails(MISSING)
            .seen(Target, put_manifest("1"), 0..=0),
        fault("R29-blob", "a manifest whose layer is missing")
            .at(Source, get_blob(large()), refusal(404, "BLOB_UNKNOWN"))
            .fails(MISSING)
            .seen(Source, get_blob(large()), 1..=2)
            .seen(Target, put_manifest("1"), 0..=0),
    ];
    rows.map(Row::from).into()
}

fn pages() -> Vec<Row> {
    const REFUSED: &[Reason] = &[Reason::ManifestRefused, Reason::IntegrityError];
    const DOWN: &[Reason] = &[Reason::TargetUnavailable];
    let page = || Action::respond(200).header("Content-Type", "text/html").body(HTML);
    let source = |id: &str, matcher: Matcher| {
        fault(id, "a page of a captive portal at the source").at(Source, matcher, page()).seen(
            Target,
            put_blobs(),
            0..=0,
        )
    };
    let target = |id: &str, matcher: Matcher| {
        fault(id, "a page of a captive portal at the target").at(Target, matcher, page()).fails(DOWN)
    };
    let rows = [
        source("R30-tag", get_manifest("1")).fails(REFUSED),
        source("R30-all", Matcher::new()).fails(REFUSED),
        source("R30-all-old", Matcher::new()).old().fails(REFUSED),
        target("R30-target", Matcher::new()).seen(Target, put_blobs(), 0..=0),
        fault("R30-target-head", "a page in place of a HEAD at the target: what GET says counts").at(
            Target,
            head_manifest().skip(1),
            page(),
        ),
        target("R30-target-post", post()).seen(Target, put_blobs(), 0..=0),
        target("R30-target-put", put_blobs()),
        target("R30-target-tag", put_manifest("1")),
        target("R30-target-tag-old", put_manifest("1")).old(),
        target("R30-target-child", put_manifest(&INDEX.manifests[0].digest)).index(),
        fault("R35", "warnings change nothing")
            .at(Source, Matcher::new(), Action::set_header("Warning", "299 - \"this registry will be switched off\""))
            .at(Target, Matcher::new(), Action::set_header("Warning", "299 - \"this registry will be switched off\""))
            .seen(Target, put_blobs(), 3..=3)
            .seen(Source, Matcher::new(), 5..=5),
    ];
    rows.map(Row::from).into()
}

fn names() -> Vec<Row> {
    let mut rows = vec![
        row("R31-plain", "no plain HTTP where TLS fails", |bench| hello(bench, |hello| hello.first() == Some(&0x16))),
        row("R33", "HTTP/2 is never offered", |bench| hello(bench, offers_http1_alone)),
        row("R32", "a name that does not exist stops no other image", unknown_name),
        row("R32-target", "a target whose name does not exist", |bench| async move {
            let target = bench.target.registry().at("registry.invalid");
            let report = bench.copy_between(&client(), bench.source.registry(), &target, &bench.to).await?;
            bench.failed(&report, &[Reason::TargetUnavailable], None).await?;
            let is_named = report.failed().all(|(_, failure)| failure.message.contains("registry.invalid"));
            ensure!(is_named && bench.source.count(&get_blob(large())) == 0, "{report:?}");
            Ok(())
        }),
    ];
    for id in ["right", "expired", "early", "name", "authority"] {
        for is_source in [true, false] {
            let side = if is_source { "source" } else { "target" };
            let what = "a certificate that is right but for one thing: what it is, and what to do, at once";
            rows.push(row(&format!("R31-{id}-{side}"), what, move |bench| shown(bench, is_source, id)));
        }
    }
    rows
}

/// A certificate that is right but for one thing, and what the message then says.
struct Certificate {
    names: &'static [&'static str],
    years: Range<i32>,
    is_ours: bool,
    says: [&'static str; 2],
}

fn certificate(id: &str) -> Certificate {
    let right = Certificate { names: &["127.0.0.2"], years: 2020..2099, is_ours: true, says: ["", ""] };
    match id {
        "expired" => Certificate { years: 2020..2021, says: ["has expired", "renewed"], ..right },
        "early" => Certificate { years: 2098..2099, says: ["is not valid yet", "clocks"], ..right },
        "name" => Certificate { names: &["other.example"], says: ["other.example", "use a name"], ..right },
        "authority" => Certificate { is_ours: false, says: ["is not trusted", "ca.crt"], ..right },
        _ => right,
    }
}

async fn shown(bench: Bench, is_source: bool, id: &'static str) -> Result<()> {
    let bench = bench.writing_free().await?;
    let Certificate { names, years, is_ours, says } = certificate(id);
    let authority = if is_ours { bench.env.ca()? } else { Ca::generate()? };
    let (right, wrong) = if is_source { (&bench.target, &bench.source) } else { (&bench.source, &bench.target) };
    let proxy = Proxy::to(bench.env, wrong.registry()).identity(authority.server_for(names, years)?).start().await?;
    let relay = Relay::to(&proxy.host()).await?;
    let wrong = proxy.registry().at(&relay.host());
    let (source, target) = if is_source { (&wrong, right.registry()) } else { (right.registry(), &wrong) };
    let report = bench.copy_between(&client(), source, target, &bench.to).await?;
    if id == "right" {
        return bench.copied(&report, &bench.to, &IMAGE).await;
    }
    bench.failed(&report, &[Reason::CertificateInvalid], None).await?;
    let (_, failure) = report.failed().next().context("it did not fail")?;
    ensure!(says.iter().all(|part| failure.message.contains(part)), "{failure:?}");
    ensure!(failure.message.contains(&relay.host()), "{failure:?}");
    ensure!(proxy.requests().is_empty(), "{}", lines(&proxy));
    ensure!(relay.connections() == 1, "{} connections: nothing has changed meanwhile", relay.connections());
    Ok(())
}

/// A server that closes at the first bytes: what these are is the same in every connection.
async fn hello(bench: Bench, is_right: fn(&[u8]) -> bool) -> Result<()> {
    let listener = Listener::at("127.0.0.1").await?;
    let source = bench.source.registry().at(&listener.host());
    let report = bench.copy_between(&client(), &source, bench.target.registry(), &bench.to).await?;
    bench.failed(&report, &[Reason::SourceUnavailable], None).await?;
    let heard = listener.heard();
    ensure!((1..=6).contains(&heard.len()), "{} connections", heard.len());
    ensure!(heard.iter().all(|hello| is_right(hello)), "{heard:?}");
    Ok(())
}

/// Protocols in ALPN come with their length before them (RFC 7301).
fn offers_http1_alone(hello: &[u8]) -> bool {
    let offers = |protocol: &[u8]| hello.windows(protocol.len()).any(|window| window == protocol);
    offers(b"\x08http/1.1") && !offers(b"\x02h2")
}

async fn unknown_name(bench: Bench) -> Result<()> {
    let (source, target) = (access(bench.env, bench.source.registry())?, access(bench.env, bench.target.registry())?);
    let nowhere = Access { host: "registry.invalid".parse()?, ..source.clone() };
    let images = vec![
        image(&nowhere, &bench.repository, &bench.to)?,
        image(&source, &bench.repository, &bench.beside("other"))?,
    ];
    let report = sync_from(&client(), vec![nowhere, source], target, images).await?;
    bench.failed(&report, &[Reason::SourceUnavailable], None).await?;
    let is_named = |failure: &Failure| failure.message.contains("registry.invalid");
    ensure!(report.failed().count() == 1 && report.failed().all(|(_, failure)| is_named(failure)), "{report:?}");
    ensure!(bench.at_target()?.holds(&bench.beside("other"), "1", &IMAGE).await?, "the other image is not there");
    Ok(())
}

fn circles() -> Vec<Row> {
    vec![
        row("R37-tag", "a tag copied onto itself", onto_itself),
        row("R37-repository", "a tag copied beside itself: nothing is read but the manifest", beside_itself),
        row("R37-logins", "one registry, two credentials: each for its own side", two_logins),
        row("R38", "a mirror of a mirror ends", mirror_of_mirror),
    ]
}

fn writes(proxy: &testenv::Proxy) -> usize {
    let is_write = |exchange: &&testenv::proxy::Exchange| !matches!(exchange.key.method.as_str(), "HEAD" | "GET");
    proxy.requests().iter().filter(is_write).count()
}

async fn onto_itself(mut bench: Bench) -> Result<()> {
    bench.at_target()?.push(&bench.to, "1", &IMAGE).await?;
    bench.repository.clone_from(&bench.to);
    let registry = bench.target.registry();
    let report = bench.copy_between(&client(), registry, registry, &bench.to).await?;
    bench.copied(&report, &bench.to, &IMAGE).await?;
    ensure!(writes(&bench.target) == 0, "{}", lines(&bench.target));
    Ok(())
}

async fn beside_itself(mut bench: Bench) -> Result<()> {
    bench.at_target()?.push(&bench.to, "1", &IMAGE).await?;
    bench.repository.clone_from(&bench.to);
    let registry = access(bench.env, bench.target.registry())?;
    let mut image = image(&registry, &bench.repository, &bench.to)?;
    image.target_tag = "2".parse()?;
    let report = sync_with(&client(), registry.clone(), registry, vec![image]).await?;
    bench.copied(&report, &bench.to, &IMAGE).await?;
    ensure!(bench.at_target()?.holds(&bench.to, "2", &IMAGE).await?, "the second tag is not there");
    ensure!(bench.target.count(&put_blobs()) == 0, "{}", lines(&bench.target));
    ensure!(bench.target.count(&Matcher::new().method("GET").route(Route::Blob)) == 0, "{}", lines(&bench.target));
    Ok(())
}

async fn two_logins(mut bench: Bench) -> Result<()> {
    bench.repository = bench.beside("from");
    bench.at_target()?.push(&bench.repository, "1", &IMAGE).await?;
    let reader = bench.target.registry().with_credentials("pull", "pull-password-0815");
    let report = bench.copy_between(&client(), &reader, bench.target.registry(), &bench.to).await?;
    bench.copied(&report, &bench.to, &IMAGE).await?;
    let from = format!("repository:{}:pull", bench.repository);
    let into = format!("repository:{}:pull,push", bench.to);
    let requests = bench.env.token.requests()?;
    let asked = |user: &str, scope: &String| {
        requests.iter().any(|request| request.user.as_deref() == Some(user) && request.scopes.contains(scope))
    };
    ensure!(asked("pull", &from) && asked("push", &into), "not both have logged in");
    for request in requests {
        let user = request.user.as_deref();
        ensure!(user != Some("pull") || !request.scopes.contains(&into), "the reader asks to write: {request:?}");
        let is_mount = request.scopes.contains(&into);
        ensure!(user != Some("push") || is_mount || request.scopes != [from.clone()], "the writer reads: {request:?}");
    }
    Ok(())
}

async fn mirror_of_mirror(mut bench: Bench) -> Result<()> {
    bench.repository = format!("{}/circle", bench.to);
    let at_source = testenv::Client::new(bench.env, &bench.env.source)?;
    at_source.push(&bench.repository, "1", &IMAGE).await?;
    at_source.push(&bench.to, "1", &OLD).await?;
    let there = || bench.copy();
    bench.copied(&there().await?, &bench.to, &IMAGE).await?;
    let back = async || {
        let (source, target) =
            (access(bench.env, bench.target.registry())?, access(bench.env, bench.source.registry())?);
        let image = image(&source, &bench.to, &bench.repository)?;
        sync_with(&client(), source, target, vec![image]).await
    };
    bench.target.forget();
    for _ in 0..2 {
        let report = back().await?;
        ensure!(report.failed().next().is_none(), "{report:?}");
        bench.copied(&there().await?, &bench.to, &IMAGE).await?;
    }
    ensure!(writes(&bench.source) + writes(&bench.target) == 0, "{}", lines(&bench.source));
    Ok(())
}
