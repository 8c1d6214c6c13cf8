//! R9 to R13, R36: tokens, logins, and registries that ask to be left alone.

use std::time::Duration;

use anyhow::{Result, ensure};
use imagemirror::reason::Reason;
use testenv::{
    Env, Registry,
    proxy::{Action, Close, Matcher, Proxy, Route},
};

use super::bench::{
    Bench, IMAGE, OLD, Row,
    Side::{Source, Target},
    client, cut, fault, get_blob, get_manifest, head_manifest, large, lines, post_blob, put_blob, put_blobs,
    put_manifest, refusal, row, small,
};

pub(super) fn rows() -> Vec<Row> {
    [run_out(), token_servers(), refused(), left_alone(), limited()].into_iter().flatten().collect()
}

/// What sends clients to a token server.
pub(super) fn bearer(realm: &str) -> String {
    format!(r#"Bearer realm="{realm}",service="testenv""#)
}

fn expired() -> Action {
    let challenge = format!(r#"{},error="invalid_token""#, bearer(&Env::get().token.url));
    refusal(401, "UNAUTHORIZED").header("WWW-Authenticate", &challenge)
}

fn run_out() -> Vec<Row> {
    let rows = [
        fault("R9-get", "a token that runs out before a download")
            .tokens()
            .at(Source, get_blob(large()).times(1), expired())
            .seen(Source, get_blob(large()), 2..=2)
            .seen(Target, put_blob(large()), 1..=1),
        fault("R9-resume", "a token that runs out where a download is continued")
            .tokens()
            .at(Source, get_blob(large()).times(1), cut(600_000, Close::Reset))
            .at(Source, get_blob(large()).times(1), expired())
            .seen(Source, get_blob(large()), 3..=3)
            .seen(Target, put_blob(large()), 1..=1)
            .sent_once(),
        fault("R9-post", "a token that runs out before an upload opens")
            .at(Target, post_blob(large()).times(1), expired())
            .seen(Target, post_blob(large()), 2..=2)
            .seen(Target, put_blob(large()), 1..=1),
        fault("Q-401-large", "an upload that is answered 401 at once, its bytes unread")
            .at(Target, put_blob(large()).times(1), expired())
            .seen(Target, put_blob(large()), 2..=3)
            .seen(Target, post_blob(large()), 1..=3),
        fault("Q-401-small", "the same of a small blob")
            .at(Target, put_blob(small()).times(1), expired())
            .seen(Target, put_blob(small()), 2..=2)
            .seen(Target, post_blob(small()), 1..=1),
        fault("R9-manifest", "a token that runs out before the tag is written")
            .at(Target, put_manifest("1").times(1), expired())
            .seen(Target, put_manifest("1"), 2..=2)
            .seen(Target, put_blobs(), 3..=3),
        fault("R9-head", "a token that runs out where the target is looked at")
            .at(Target, head_manifest().skip(1).times(1), expired())
            .seen(Target, head_manifest(), 2..=2),
    ];
    rows.map(Row::from).into()
}

/// The token server of the registry with tokens behind a proxy, as the clients of `asking` are told.
async fn token_proxy(bench: &Bench, asking: &Proxy) -> Result<Proxy> {
    let url = bench.env.token.url.trim_start_matches("https://").trim_end_matches("/token");
    let server = Registry { host: url.to_owned(), tls: true, ..bench.env.target.anonymous() };
    let proxy = Proxy::to(bench.env, &server).label("tokens").start().await?;
    let challenge = bearer(&format!("{}/token", proxy.url()));
    asking.rule(Matcher::new(), Action::set_header("WWW-Authenticate", &challenge));
    Ok(proxy)
}

fn token_servers() -> Vec<Row> {
    const DOWN: &[Reason] = &[Reason::TargetUnavailable];
    let page = Action::respond(200).header("Content-Type", "text/html").body("<!DOCTYPE html>");
    let huge = Action::respond(200).body(format!(r#"{{"token":"{}"}}"#, "a".repeat(100_000)));
    let mut rows = Vec::new();
    for (id, what, action, is_once, reasons) in [
        ("R10-close", "a token server that is not there", Action::CloseBefore(Close::Reset), false, DOWN),
        ("R10-503", "a token server that is down", Action::respond(503), false, DOWN),
        ("R10-page", "a token server that sends a page", page, false, DOWN),
        ("T15-token", "a token server whose answer is too long", huge, false, DOWN),
        (
            "R10-401",
            "a token server that does not know us",
            Action::respond(401),
            false,
            &[Reason::AuthenticationFailed],
        ),
        ("R10-403", "a token server that refuses us", Action::respond(403), false, &[Reason::AuthenticationFailed]),
        ("R10-404", "a token server that has moved", Action::respond(404), false, DOWN),
        ("R10-close-once", "a token server that breaks off once", Action::CloseBefore(Close::Reset), true, &[]),
        ("R10-503-once", "a token server that is down once", Action::respond(503), true, &[]),
        (
            "R10-429-once",
            "a token server that is busy once",
            Action::respond(429).header("Retry-After", "0"),
            true,
            &[],
        ),
        ("R10-stall-once", "a token server that is slow once", Action::Stall, true, &[]),
    ] {
        rows.push(row(id, what, move |bench| token_server(bench, action, is_once, reasons)));
    }
    rows.push(row("R10-404-source", "the same at the source: it says nothing of the tag", |bench| {
        moved_at_source(bench, false)
    }));
    rows.push(row("R10-404-source-old", "the same, and a tag at the target", |bench| moved_at_source(bench, true)));
    rows.push(row("R10-valid", "a token that is valid goes on while the token server is down", still_valid));
    rows.push(row("T1-token-redirect", "a token server that redirects to another host", redirected_token));
    rows.push(row("R10-redirect", "a token server that redirects on its own host", moved_token));
    for (id, issued_at, expires_in) in [
        ("past", "2001-01-01T00:00:00Z", 300),
        ("future", "2099-01-01T00:00:00Z", 300),
        ("zero", "2026-01-01T00:00:00Z", 0),
    ] {
        let what = format!("a token issued in the {id}: our own clock counts");
        rows.push(row(&format!("R36-{id}"), &what, move |bench| skewed(bench, issued_at, expires_in)));
    }
    rows
}

async fn token_server(bench: Bench, action: Action, is_once: bool, reasons: &'static [Reason]) -> Result<()> {
    let tokens = token_proxy(&bench, &bench.target).await?;
    let matcher = if is_once { Matcher::new().times(1) } else { Matcher::new() };
    tokens.rule(matcher, action);
    let report = bench.copy_with(&crate::cases::client(), &bench.to).await?;
    if reasons.is_empty() {
        return bench.copied(&report, &bench.to, &IMAGE).await;
    }
    bench.failed(&report, reasons, None).await?;
    ensure!((1..=6).contains(&tokens.requests().len()), "{}", lines(&tokens));
    ensure!(bench.target.requests().iter().all(|exchange| !exchange.authorized), "{}", lines(&bench.target));
    Ok(())
}

async fn moved_at_source(bench: Bench, has_old: bool) -> Result<()> {
    let bench = bench.reading_tokens().await?;
    if has_old {
        bench.push_old().await?;
    }
    let tokens = token_proxy(&bench, &bench.source).await?;
    tokens.rule(Matcher::new(), Action::respond(404));
    let report = bench.copy().await?;
    bench.failed(&report, &[Reason::SourceUnavailable], has_old.then(|| OLD.digest())).await
}

async fn still_valid(bench: Bench) -> Result<()> {
    let tokens = token_proxy(&bench, &bench.target).await?;
    let client = client();
    let report = bench.copy_with(&client, &bench.to).await?;
    bench.copied(&report, &bench.to, &IMAGE).await?;
    tokens.rule(Matcher::new(), Action::CloseBefore(Close::Reset));
    bench.at_target()?.delete(&bench.to, "1").await?;
    let report = bench.copy_with(&client, &bench.to).await?;
    bench.copied(&report, &bench.to, &IMAGE).await?;
    ensure!(tokens.requests().len() == 1, "{}", lines(&tokens));
    Ok(())
}

async fn redirected_token(bench: Bench) -> Result<()> {
    let tokens = token_proxy(&bench, &bench.target).await?;
    let listener = bench.listener().await?;
    let away = format!("{}/token", listener.url()).replace("127.0.0.1", "localhost");
    tokens.rule(Matcher::new(), Action::respond(307).header("Location", &away));
    let report = bench.copy().await?;
    bench.failed(&report, &[Reason::Blocked, Reason::TargetUnavailable], None).await?;
    ensure!(listener.requests().iter().all(|exchange| !exchange.authorized), "{}", lines(&listener));
    Ok(())
}

async fn moved_token(bench: Bench) -> Result<()> {
    let tokens = token_proxy(&bench, &bench.target).await?;
    let scope = format!("repository:{}:pull,push", bench.to);
    let moved = format!("/token?service=testenv&scope={scope}&moved");
    tokens.rule(Matcher::new().times(1), Action::respond(307).header("Location", &moved));
    let report = bench.copy().await?;
    bench.copied(&report, &bench.to, &IMAGE).await
}

/// A registry that asks for a token once, and a token server whose clock is wrong.
async fn skewed(bench: Bench, issued_at: &'static str, expires_in: u32) -> Result<()> {
    let bench = bench.writing_free().await?;
    let tokens = bench.listener().await?;
    let answer = format!(r#"{{"token":"a","issued_at":"{issued_at}","expires_in":{expires_in}}}"#);
    tokens.rule(Matcher::new(), Action::respond(200).body(answer));
    let challenge = bearer(&format!("{}/token", tokens.url()));
    bench.target.rule(Matcher::new().times(1), Action::respond(401).header("WWW-Authenticate", &challenge));
    let report = bench.copy().await?;
    bench.copied(&report, &bench.to, &IMAGE).await?;
    let fetched = tokens.requests().len();
    let most = if expires_in == 0 { 5 } else { 1 };
    ensure!((1..=most).contains(&fetched), "{}", lines(&tokens));
    Ok(())
}

fn refused() -> Vec<Row> {
    vec![
        row("R11", "a registry that never accepts a token: two of them and no more", never_accepted),
        row("R11-pull-only", "a credential that may not write", pull_only),
        row("R11-basic", "a registry that never accepts a password", wrong_password),
        fault("R11-scope", "a registry that wants more than the token server grants")
            .old()
            .at(
                Target,
                put_manifest("1"),
                refusal(401, "UNAUTHORIZED").header(
                    "WWW-Authenticate",
                    &format!(r#"{},error="insufficient_scope""#, bearer(&Env::get().token.url)),
                ),
            )
            .fails(&[Reason::AuthenticationFailed, Reason::PermissionDenied])
            .seen(Target, put_manifest("1"), 1..=3)
            .into(),
        fault("R11-403", "403 is not tried again")
            .at(Target, put_blob(small()), refusal(403, "DENIED"))
            .fails(&[Reason::PermissionDenied])
            .seen(Target, put_blob(small()), 1..=1)
            .into(),
    ]
}

async fn never_accepted(bench: Bench) -> Result<()> {
    let tokens = token_proxy(&bench, &bench.target).await?;
    bench.target.clear();
    let challenge = bearer(&format!("{}/token", tokens.url()));
    bench.target.rule(Matcher::new(), refusal(401, "UNAUTHORIZED").header("WWW-Authenticate", &challenge));
    let report = bench.copy().await?;
    bench.failed(&report, &[Reason::AuthenticationFailed], None).await?;
    ensure!(tokens.requests().len() <= 2, "{}", lines(&tokens));
    ensure!(bench.target.requests().len() <= 3, "{}", lines(&bench.target));
    Ok(())
}

async fn pull_only(bench: Bench) -> Result<()> {
    let tokens = token_proxy(&bench, &bench.target).await?;
    bench.push_old().await?;
    let reader = bench.target.registry().with_credentials("pull", "pull-password-0815");
    let report = bench.copy_between(&client(), bench.source.registry(), &reader, &bench.to).await?;
    bench.failed(&report, &[Reason::AuthenticationFailed, Reason::PermissionDenied], Some(OLD.digest())).await?;
    // One, and one more for each of the blobs that start side by side.
    ensure!(tokens.requests().len() <= 4, "{}", lines(&tokens));
    ensure!(bench.target.count(&put_blobs()) == 0, "{}", lines(&bench.target));
    Ok(())
}

async fn wrong_password(bench: Bench) -> Result<()> {
    let stranger = bench.source.registry().with_credentials("puller", "not the password");
    let report = bench.copy_between(&client(), &stranger, bench.target.registry(), &bench.to).await?;
    bench.failed(&report, &[Reason::AuthenticationFailed], None).await?;
    ensure!(bench.source.requests().len() <= 2, "{}", lines(&bench.source));
    Ok(())
}

/// An instant as HTTP writes it.
fn http_date(from_now: Duration) -> String {
    let at = jiff::Timestamp::now() + from_now;
    jiff::fmt::rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&at).unwrap_or_default()
}

fn left_alone() -> Vec<Row> {
    let date = || http_date(Duration::from_secs(4));
    let mut rows = vec![
        row("R12-seconds", "429 with seconds: nobody asks until then", |bench| shut(bench, 429, || "2".to_owned())),
        row("R12-date", "429 with a date: nobody asks until then", move |bench| shut(bench, 429, date)),
        row("R12-503", "503 with seconds: nobody asks until then", |bench| shut(bench, 503, || "2".to_owned())),
    ];
    let busy = |after: &str| Action::respond(429).header("Retry-After", after);
    for (name, matcher) in [
        ("post", post_blob(large())),
        ("put-large", put_blob(large())),
        ("put-small", put_blob(small())),
        ("put-manifest", put_manifest("1")),
    ] {
        let once = fault(&format!("R12-{name}"), "429 at the target")
            .at(Target, matcher.clone().times(1), busy("1"))
            .seen(Target, matcher, 2..=2);
        rows.push(once.into());
    }
    for (id, after) in [("hour", "1000000000"), ("past", "Wed, 21 Oct 2015 07:28:00 GMT"), ("words", "soon")] {
        let matcher = get_blob(large());
        let asked = fault(&format!("R12-{id}"), "429 for very long, until the past, until nobody knows");
        let asked = match id {
            "hour" => asked.at(Source, matcher.clone(), busy(after)).fails(&[Reason::RateLimited]).seen(
                Source,
                matcher,
                1..=1,
            ),
            _ => asked.at(Source, matcher.clone().times(1), busy(after)).seen(Source, matcher, 2..=2),
        };
        rows.push(asked.into());
    }
    rows
}

/// Two copies that share a client; the registry asks one of them to wait.
async fn shut(bench: Bench, status: u16, after: impl Fn() -> String) -> Result<()> {
    let client = client();
    let asked = Matcher::new().route(Route::Manifest).skip(1).times(1);
    bench.source.rule(asked, Action::respond(status).header("Retry-After", &after()));
    let beside = bench.beside("second");
    let first = bench.copy_with(&client, &bench.to);
    let second = async {
        let is_shut = |log: &[testenv::proxy::Exchange]| log.iter().any(|exchange| exchange.status == Some(status));
        bench.source.wait_for(is_shut, Duration::from_secs(10)).await?;
        let before = bench.source.requests().len();
        let nobody = async {
            let asks = bench.source.wait_for(|log| log.len() > before, Duration::from_millis(1500)).await;
            ensure!(asks.is_err(), "the registry was asked: {}", lines(&bench.source));
            Ok(())
        };
        let (report, nobody) = tokio::join!(bench.copy_with(&client, &beside), nobody);
        nobody?;
        report
    };
    let (first, second) = tokio::join!(first, second);
    bench.copied(&first?, &bench.to, &IMAGE).await?;
    bench.copied(&second?, &beside, &IMAGE).await
}

fn limited() -> Vec<Row> {
    let quota = || refusal(429, "TOOMANYREQUESTS");
    let rows = [
        fault("R13-manifest", "429 without end and without a time")
            .at(Source, get_manifest("1"), quota())
            .fails(&[Reason::RateLimited])
            .seen(Source, get_manifest("1"), 2..=6),
        fault("R13-blob", "the same of a blob")
            .at(Source, get_blob(large()), quota())
            .fails(&[Reason::RateLimited])
            .seen(Source, get_blob(large()), 2..=20),
        fault("R13-put", "the same of an upload: a quota")
            .at(Target, put_blob(small()), quota())
            .fails(&[Reason::RateLimited, Reason::QuotaExceeded])
            .seen(Target, put_blob(small()), 1..=5),
        fault("R13-tag", "the same of the tag")
            .old()
            .at(Target, put_manifest("1"), quota())
            .fails(&[Reason::RateLimited, Reason::QuotaExceeded])
            .seen(Target, put_manifest("1"), 1..=6),
        fault("R13-once", "429 once, without a time").at(Source, get_blob(large()).times(1), quota()),
    ];
    rows.map(Row::from).into()
}
