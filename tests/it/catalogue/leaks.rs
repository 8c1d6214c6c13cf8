//! T1 to T3: a registry that sends us elsewhere to get our credentials, or the bytes. Each threat twice: it comes to
//! nothing, and what is like it and honest still works.

use anyhow::{Result, ensure};
use imagemirror::{
    reason::Reason,
    registry::{Client, HostOptions},
};
use testenv::proxy::{Action, Matcher, Proxy, Route};

use super::{
    auth::bearer,
    bench::{
        Bench, IMAGE, OLD, Row, fault, get_blob, get_manifest, head_manifest, lines, options, post, put_blob,
        put_blobs, put_manifest, row, small,
    },
};

const BLOCKED: &[Reason] = &[Reason::Blocked];

/// An address at a listener.
type Url = fn(&Proxy) -> String;

pub(super) fn rows() -> Vec<Row> {
    [realms(), redirects(), locations()].into_iter().flatten().collect()
}

/// The same host by another name.
fn by_name(url: &str) -> String {
    url.replace("127.0.0.1", "localhost")
}

/// No request of ours at all, or at least none with a credential.
fn no_credential(listener: &Proxy) -> Result<()> {
    ensure!(listener.requests().iter().all(|exchange| !exchange.authorized), "a credential:{}", lines(listener));
    Ok(())
}

fn silence(listener: &Proxy) -> Result<()> {
    ensure!(listener.requests().is_empty(), "it was asked:{}", lines(listener));
    Ok(())
}

fn realms() -> Vec<Row> {
    let mut rows = vec![
        row("T1-allowed", "a token server of another domain that the administrator allows", allowed_realm),
        fault("T1-honest", "a token server on another port of the registry's host").tokens().into(),
    ];
    let away = |listener: &Proxy| format!("{}/token", by_name(&listener.url()));
    let cases: [(&str, Url); 5] = [
        ("host", away),
        ("http", |listener| format!("http://{}/token", listener.host())),
        ("user", |listener| format!("https://127.0.0.1@localhost:{}/token", port(listener))),
        ("suffix", |listener| format!("https://127.0.0.1.localhost:{}/token", port(listener))),
        ("file", |_| "file:///etc/passwd".to_owned()),
    ];
    for (id, realm) in cases {
        for is_source in [true, false] {
            let side = if is_source { "source" } else { "target" };
            rows.push(row(
                &format!("T1-{id}-{side}"),
                "a token server that credentials must not go to",
                move |bench| realm_elsewhere(bench, realm, is_source),
            ));
        }
    }
    rows
}

fn port(proxy: &Proxy) -> String {
    proxy.host().rsplit(':').next().unwrap_or_default().to_owned()
}

async fn realm_elsewhere(bench: Bench, realm: Url, is_source: bool) -> Result<()> {
    let listener = bench.listener().await?;
    let asked = if is_source { &bench.source } else { &bench.target };
    let challenge = bearer(&realm(&listener));
    asked.rule(Matcher::new(), Action::respond(401).header("WWW-Authenticate", &challenge));
    let report = bench.copy().await?;
    bench.failed(&report, BLOCKED, None).await?;
    silence(&listener)
}

async fn allowed_realm(bench: Bench) -> Result<()> {
    let mut options = options();
    let auth_hosts = vec!["localhost".parse()?];
    let host = bench.target.host().parse()?;
    options.hosts.insert(host, HostOptions { auth_hosts, ..HostOptions::default() });
    let challenge = bearer(&by_name(&bench.env.token.url));
    bench.target.rule(Matcher::new(), Action::set_header("WWW-Authenticate", &challenge));
    let report = bench.copy_with(&Client::new(options), &bench.to).await?;
    bench.copied(&report, &bench.to, &IMAGE).await
}

/// Where a redirect leads.
#[derive(Clone, Copy, Debug)]
enum Away {
    Port,
    Host,
    Http,
}

/// What is redirected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Manifest,
    Blob,
    Head,
}

fn redirects() -> Vec<Row> {
    let mut rows = Vec::new();
    for status in [301, 302, 303, 307, 308] {
        for away in [Away::Port, Away::Host, Away::Http] {
            for step in [Step::Manifest, Step::Blob, Step::Head] {
                rows.push(row(
                    &format!("T2-{status}-{away:?}-{step:?}"),
                    "a redirect takes no credential along",
                    move |bench| redirected(bench, status, away, step),
                ));
            }
        }
    }
    for status in [301, 302, 303, 307, 308] {
        for (what, matcher) in [("post", post()), ("blob", put_blob(small())), ("tag", put_manifest("1"))] {
            rows.push(row(&format!("T2-{status}-write-{what}"), "a write is not taken elsewhere", move |bench| {
                redirected_write(bench, status, matcher)
            }));
        }
    }
    rows.push(row("T2-challenge", "a host that was redirected to asks for a password", challenged));
    rows.push(row("T2-challenge-token", "the same, by way of our own token server's host", challenged_for_token));
    rows.push(row("T2-back", "a redirect away and back", there_and_back));
    rows
}

async fn redirected(bench: Bench, status: u16, away: Away, step: Step) -> Result<()> {
    let listener = match away {
        Away::Http => Proxy::to(bench.env, bench.world.free.registry()).plain().start().await?,
        Away::Host | Away::Port => bench.listener().await?,
    };
    let url = if matches!(away, Away::Host) { by_name(&listener.url()) } else { listener.url() };
    let to = |path: &str| Action::respond(status).header("Location", &format!("{url}/v2/{}/{path}", bench.repository));
    match step {
        Step::Manifest => bench.source.rule(get_manifest("1").skip(1), to("manifests/1")),
        Step::Blob => bench.source.rule(get_blob(small()), to(&format!("blobs/{}", small().digest))),
        Step::Head => {
            bench.source.rule(head_manifest().skip(1), to("manifests/1"));
            bench.push_old().await?;
        }
    }
    let report = bench.copy().await?;
    if matches!(away, Away::Http) {
        bench.failed(&report, BLOCKED, (step == Step::Head).then(|| OLD.digest())).await?;
        return silence(&listener);
    }
    bench.copied(&report, &bench.to, &IMAGE).await?;
    ensure!(!listener.requests().is_empty(), "the redirect was not followed");
    no_credential(&listener)
}

async fn redirected_write(bench: Bench, status: u16, matcher: Matcher) -> Result<()> {
    let listener = bench.listener().await?;
    let away = format!("{}/v2/", by_name(&listener.url()));
    bench.target.rule(matcher, Action::respond(status).header("Location", &away));
    let report = bench.copy().await?;
    bench.failed(&report, BLOCKED, None).await?;
    silence(&listener)
}

async fn challenged(bench: Bench) -> Result<()> {
    let listener = Proxy::to(bench.env, &bench.env.source).start().await?;
    let away = format!("{}/v2/{}/blobs/{}", listener.url(), bench.repository, small().digest);
    bench.source.rule(get_blob(small()), Action::respond(307).header("Location", &away));
    let report = bench.copy().await?;
    bench.failed(&report, &[Reason::AuthenticationFailed, Reason::SourceUnavailable], None).await?;
    no_credential(&listener)
}

/// The other host names a token server that would do for the registry, on a port of its own.
async fn challenged_for_token(bench: Bench) -> Result<()> {
    let (cdn, tokens) = (bench.listener().await?, bench.listener().await?);
    let challenge = bearer(&format!("{}/token", tokens.url()));
    cdn.rule(Matcher::new(), Action::respond(401).header("WWW-Authenticate", &challenge));
    let away = format!("{}/v2/{}/blobs/{}", by_name(&cdn.url()), bench.repository, small().digest);
    bench.source.rule(get_blob(small()), Action::respond(307).header("Location", &away));
    let report = bench.copy().await?;
    bench.failed(&report, &[Reason::AuthenticationFailed, Reason::SourceUnavailable], None).await?;
    no_credential(&cdn)?;
    silence(&tokens)
}

async fn there_and_back(bench: Bench) -> Result<()> {
    let listener = bench.listener().await?;
    let at = |url: &str| format!("{url}/v2/{}/blobs/{}", bench.repository, small().digest);
    let there = Action::respond(307).header("Location", &at(&listener.url()));
    bench.source.rule(get_blob(small()).times(1), there);
    listener.rule(Matcher::new(), Action::respond(307).header("Location", &at(&bench.source.url())));
    let report = bench.copy().await?;
    bench.copied(&report, &bench.to, &IMAGE).await?;
    no_credential(&listener)
}

fn locations() -> Vec<Row> {
    let mut rows = vec![row("T3-relative", "a location without a host", |bench| async move {
        let bench = bench.writing_free().await?;
        let report = bench.copy().await?;
        bench.copied(&report, &bench.to, &IMAGE).await
    })];
    let cases: [(&str, Url); 4] = [
        ("port", |listener| format!("{}/v2/x/blobs/uploads/1", listener.url())),
        ("host", |listener| format!("{}/v2/x/blobs/uploads/1", by_name(&listener.url()))),
        ("http", |listener| format!("http://{}/v2/x/blobs/uploads/1", listener.host())),
        ("bare", |listener| format!("//{}/v2/x/blobs/uploads/1", listener.host())),
    ];
    for (id, location) in cases {
        rows.push(row(&format!("T3-{id}"), "a location at another host", move |bench| located(bench, location)));
        rows.push(row(&format!("T3-{id}-cancel"), "the same where a session is given up", move |bench| {
            located_at_cancel(bench, location)
        }));
    }
    rows
}

async fn located(bench: Bench, location: Url) -> Result<()> {
    let listener = bench.listener().await?;
    bench.target.rule(post(), Action::set_header("Location", &location(&listener)));
    let report = bench.copy().await?;
    bench.failed(&report, BLOCKED, None).await?;
    silence(&listener)
}

async fn located_at_cancel(bench: Bench, location: Url) -> Result<()> {
    let listener = bench.listener().await?;
    let status = Matcher::new().method("GET").route(Route::Upload);
    bench.target.rule(status, Action::set_header("Location", &location(&listener)));
    bench.target.rule(put_blobs(), Action::respond(507));
    let report = bench.copy().await?;
    bench.failed(&report, &[Reason::QuotaExceeded], None).await?;
    silence(&listener)
}
