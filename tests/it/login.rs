//! Logging in at a token server of a registry that checks what its tokens say: who is shown which credential, what a
//! token costs, what happens where it grants less than was asked for, and where it ends before the layer does.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use imagemirror::{
    auth::CredentialStore,
    copy::Referrers,
    reason::Reason,
    registry::{Access, Client, ClientOptions, HostOptions, Quirks, Repository, UploadStrategy},
};
use serde_json::{Value, json};
use testenv::{
    Content, Env, Image, Proxy, Registry, RegistryOptions, RegistryServer,
    proxy::{Action, Close, Exchange, Matcher, Route},
    token::{TokenOptions, TokenRequest, TokenServer, User},
};

use crate::{
    cases::{self, access, side_by_side, sync_with},
    direct::{Direct, client_of, prefix},
};

/// Who pushes and looks, and is in no count.
const JUDGE: &str = "judge";
const MIB: usize = 1 << 20;

/// A registry and its token server, each behind a proxy.
struct Site {
    tokens: TokenServer,
    door: Proxy,
    server: RegistryServer,
    registry: Proxy,
}

impl Site {
    async fn start(mut options: TokenOptions) -> Result<Self> {
        let env = cases::env();
        options.users.push(User::new(JUDGE, "judge-password", &["pull", "push"]));
        let tokens = TokenServer::start(&env.ca()?, &env.log("login-tokens"), options).await?;
        let door = Proxy::to_tokens(env, tokens.endpoint()).start().await?;
        let auth = tokens.endpoint().at(&door.url()).auth();
        let options = RegistryOptions { name: "login".into(), auth, disk: true, ..RegistryOptions::default() };
        let server = RegistryServer::start(env, options).await?;
        let registry = Proxy::to(env, server.registry()).start().await?;
        Ok(Self { tokens, door, server, registry })
    }

    /// The registry as this user reaches it.
    fn of(&self, user: &str) -> Result<Registry> {
        let user = self.tokens.endpoint().user(user).context("no such user")?;
        Ok(self.registry.registry().with_credentials(&user.name, &user.password))
    }

    /// Goes past the proxy.
    fn judge(&self) -> Result<testenv::Client> {
        client_of(&self.of(JUDGE)?.at(self.server.host()))
    }

    /// What has been asked of the token server.
    fn logins(&self) -> Result<Vec<TokenRequest>> {
        let all = self.tokens.endpoint().requests()?.into_iter();
        Ok(all.filter(|login| login.user.as_deref() != Some(JUDGE)).collect())
    }

    fn statuses(&self, matcher: &Matcher) -> Vec<u16> {
        matching(&self.registry, matcher).into_iter().map(|exchange| exchange.status.unwrap_or_default()).collect()
    }
}

fn matching(proxy: &Proxy, matcher: &Matcher) -> Vec<Exchange> {
    let all = proxy.requests().into_iter();
    all.filter(|exchange| matcher.matches(&exchange.key, &exchange.path)).collect()
}

fn posts_of(blob: &Content) -> Matcher {
    Matcher::new().method("POST").route(Route::UploadStart).reference(&blob.digest)
}

fn largest(image: &Image) -> Result<&Content> {
    image.blobs.iter().max_by_key(|blob| blob.bytes.len()).context("no blobs")
}

/// An image with layers of these sizes where everybody may read it, and its repository.
async fn open_image(layers: &[usize]) -> Result<(String, Image)> {
    let (name, image) = (prefix("login"), Image::single(fastrand::u64(..), layers));
    client_of(&cases::env().open)?.push(&name, "1", &image).await?;
    Ok((name, image))
}

fn copy(from: &str, to: &str) -> Direct {
    Direct::of(&format!("{from}:1"), &format!("{to}:1")).referrers(Referrers::None)
}

#[tokio::test]
async fn an_identity_token_is_shown_to_the_token_server_alone() -> Result<()> {
    let cases = [
        ("a token that stays", false, None),
        ("a token that is used up by a login", true, None),
        ("a token where nothing can be posted", false, Some(404)),
        ("a token where nothing may be posted", false, Some(405)),
        ("both", true, Some(404)),
    ];
    side_by_side(cases.map(|(what, rotates, refusal)| (what.to_owned(), Box::pin(identity(rotates, refusal))))).await
}

async fn identity(rotates: bool, refusal: Option<u16>) -> Result<()> {
    let site = Site::start(TokenOptions { oauth2: true, rotates, ..TokenOptions::default() }).await?;
    if let Some(status) = refusal {
        site.door.rule(Matcher::new().method("POST"), Action::respond(status));
    }
    let (image, judge) = (Image::single(fastrand::u64(..), &[3_000]), site.judge()?);
    judge.push("from", "1", &image).await?;
    let registry = site.registry.registry().with_credentials("<token>", &site.tokens.refresh_token("push"));
    // Repositories whose tokens are wanted at the same time.
    let to = ["to-1", "to-2", "to-3", "to-4"];
    let copies = to.iter().skip(1).fold(copy("from", to[0]), |copies, to| copies.and("from:1", &format!("{to}:1")));
    copies.done(&registry, &registry).await?;

    let logins = site.logins()?;
    let is_it = |login: &TokenRequest| {
        let grant = if refusal.is_none() { Some("refresh_token") } else { None };
        (login.status, login.user.as_deref(), login.grant_type.as_deref()) == (200, Some("push"), grant)
    };
    ensure!(logins.len() == to.len() + 1 && logins.iter().all(is_it), "{logins:#?}");
    for to in to {
        ensure!(judge.holds(to, "1", &image).await?, "{to}");
    }
    for request in site.registry.requests() {
        let authorization = request.headers.get("Authorization").map(|value| value.to_str().unwrap_or_default());
        ensure!(authorization.is_none_or(|value| value.starts_with("Bearer ey")), "{authorization:?}");
        ensure!(!format!("{}{:?}", request.path, request.headers).contains("e30."), "{request:#?}");
        // Bodies are what the registry has found to be the image.
        ensure!(request.request_bytes == 0 || request.key.method == "PUT", "{request:#?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_registry_that_asks_for_a_password_is_shown_no_identity_token() -> Result<()> {
    let env = cases::env();
    let proxy = Proxy::to(env, &env.source).start().await?;
    let registry = proxy.registry().with_credentials("<token>", "an identity token");
    let (reason, message) = copy("a", "b").fails(&registry, &env.open).await?;
    ensure!(reason == Reason::AuthenticationFailed, "{reason}: {message}");
    ensure!(!proxy.requests().is_empty() && proxy.requests().iter().all(|request| !request.authorized));
    Ok(())
}

#[tokio::test]
async fn a_password_is_posted_only_where_it_cannot_be_used_otherwise() -> Result<()> {
    let cases =
        [(None, &["GET 200"][..]), (Some(404), &["GET 404", "POST 200"]), (Some(405), &["GET 405", "POST 200"])];
    side_by_side(cases.map(|(refusal, expected)| (format!("GET is answered {refusal:?}"), password(refusal, expected))))
        .await
}

async fn password(refusal: Option<u16>, expected: &[&str]) -> Result<()> {
    let site = Site::start(TokenOptions { oauth2: true, ..TokenOptions::default() }).await?;
    if let Some(status) = refusal {
        site.door.rule(Matcher::new().method("GET"), Action::respond(status));
    }
    let (from, _) = open_image(&[3_000]).await?;
    copy(&from, "to").done(&Env::get().open, &site.of("push")?).await?;
    let line = |request: &Exchange| format!("{} {}", request.key.method, request.status.unwrap_or_default());
    let seen: Vec<String> = site.door.requests().iter().map(line).collect();
    ensure!(seen == expected, "{seen:?}");
    let logins = site.logins()?;
    let grant = refusal.map(|_| "password".to_owned());
    ensure!(
        logins.len() == 1 && logins[0].user.as_deref() == Some("push") && logins[0].grant_type == grant,
        "{logins:?}"
    );
    Ok(())
}

#[tokio::test]
async fn what_is_not_granted_is_asked_for_twice_and_then_said() -> Result<()> {
    let site = Site::start(TokenOptions::default()).await?;
    let (from, image) = open_image(&[]).await?;
    site.judge()?.push("from", "1", &image).await?;
    let (nobody, reader, open) = (site.of("nobody")?, site.of("pull")?, &Env::get().open);
    let manifests = Matcher::new().method("GET").route(Route::Manifest);
    let posts = Matcher::new().method("POST").route(Route::UploadStart);
    for (what, source, target, from, matcher, expected, tokens, scope) in [
        ("reading", &nobody, open, "from", manifests, &[401; 3][..], 2, "repository:from:pull"),
        // The first token lets the target be looked at. Then a mount is refused, and an upload.
        ("writing", open, &reader, &from, posts, &[401; 4], 3, "repository:to:pull,push"),
    ] {
        site.registry.forget();
        let before = site.logins()?.len();
        let (reason, message) = copy(from, "to").fails(source, target).await?;
        ensure!(reason == Reason::AuthenticationFailed, "{what}: {reason}: {message}");
        ensure!(message.contains(&format!("did not grant {scope}")), "{what}: {message}");
        ensure!(site.statuses(&matcher) == expected, "{what}: {:?}", site.statuses(&matcher));
        ensure!(site.logins()?.len() == before + tokens, "{what}: {:#?}", site.logins()?);
    }
    Ok(())
}

#[tokio::test]
async fn a_layer_is_mounted_with_a_token_for_both_repositories_and_sent_where_there_is_none() -> Result<()> {
    let (name, image) = open_image(&[2 * MIB]).await?;
    let large = largest(&image)?;
    for (first_scope_only, second, third) in [
        (false, (&[201][..], 2), (&[201][..], 2)),
        // The mount is asked for with two tokens, and never again at this registry.
        (true, (&[401, 401, 202], 3), (&[202], 1)),
    ] {
        let what = || format!("first scope only: {first_scope_only}");
        let site = Site::start(TokenOptions { first_scope_only, ..TokenOptions::default() }).await?;
        let (source, client) = (Proxy::to(Env::get(), &Env::get().open).start().await?, cases::client());
        for (to, from, (posts, tokens)) in [("a", "", (&[202][..], 1)), ("b", "a", second), ("c", "b", third)] {
            site.registry.forget();
            source.forget();
            let before = site.logins()?.len();
            copy(&name, to).with(&client).done(source.registry(), &site.of("push")?).await.with_context(what)?;
            let logins = site.logins()?.split_off(before);
            ensure!(logins.len() == tokens, "{}: {to}: {logins:#?}", what());
            let is_mounted = posts == [201];
            if is_mounted {
                let scopes = [format!("repository:{to}:pull,push"), format!("repository:{from}:pull")];
                ensure!(logins[1].scopes == scopes, "{}: {logins:#?}", what());
            }
            let reads = source.count(&Matcher::new().reference(&large.digest));
            ensure!(reads == usize::from(!is_mounted), "{}: {to}: {reads} reads", what());
            ensure!(
                site.statuses(&posts_of(large)) == posts,
                "{}: {to}: {:?}",
                what(),
                site.statuses(&posts_of(large))
            );
        }
        for to in ["a", "b", "c"] {
            ensure!(site.judge()?.holds(to, "1", &image).await?, "{}: {to}", what());
        }
    }
    Ok(())
}

#[tokio::test]
async fn many_requests_cost_one_token_for_each_repository_and_one_401_for_the_registry() -> Result<()> {
    let site = Site::start(TokenOptions::default()).await?;
    let (client, access) = (cases::client(), access(Env::get(), &site.of("pull")?)?);
    for (number, (name, unauthorized)) in [("first", 1), ("second", 0)].into_iter().enumerate() {
        site.judge()?.push(name, "1", &Image::single(1, &[])).await?;
        site.registry.forget();
        let repository = Repository::for_pull(&client, &access, name.parse()?)?;
        let found = try_join_all((0..32).map(|_| repository.head("1"))).await?;
        ensure!(found.iter().all(Option::is_some));
        let mut statuses = site.statuses(&Matcher::new());
        statuses.sort_unstable();
        ensure!(statuses == [&[200; 32][..], &[401][..unauthorized]].concat(), "{name}: {statuses:?}");
        ensure!(site.logins()?.len() == number + 1, "{name}: {:#?}", site.logins()?);
    }
    Ok(())
}

#[tokio::test]
async fn a_token_is_renewed_before_the_registry_refuses_it() -> Result<()> {
    let site = Site::start(TokenOptions { expires_in: 4, lives: Some(4), ..TokenOptions::default() }).await?;
    site.judge()?.push("a", "1", &Image::single(1, &[])).await?;
    // Not more requests than it takes to see it.
    site.registry.rule(Matcher::new(), Action::DelayAnswer(Duration::from_millis(20)));
    let access = access(Env::get(), &site.of("pull")?)?;
    let repository = Repository::for_pull(&cases::client(), &access, "a".parse()?)?;
    while site.logins()?.len() < 2 {
        repository.head("1").await?;
        let refused = site.statuses(&Matcher::new()).iter().filter(|status| **status == 401).count();
        ensure!(refused == 1, "a token was used until it was refused");
    }
    Ok(())
}

/// How long tokens are said to live and how long they do, in seconds.
#[derive(Clone, Copy, Debug)]
struct Life {
    said: u64,
    is: Option<u64>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_ends_inside_a_layer_costs_no_byte_of_it_but_those_under_way() -> Result<()> {
    let cut_download = || Action::CutResponseBody { after: 7 << 20, close: Close::Fin };
    let cut_upload = || Action::CutRequestBody { after: 7 << 20, close: Close::Fin };
    let mut cases = Vec::new();
    for life in [Life { said: 1, is: None }, Life { said: 300, is: Some(2) }] {
        for (what, at_source, strategy, cut) in [
            ("a download that breaks", true, UploadStrategy::Put, Some(cut_download())),
            ("an upload that breaks", false, UploadStrategy::Put, Some(cut_upload())),
            ("an upload and its end", false, UploadStrategy::Patch, None),
            ("an upload in chunks", false, UploadStrategy::Chunks(2 << 20), None),
        ] {
            cases.push((format!("{what}, {life:?}"), ends_inside(life, at_source, strategy, cut)));
        }
    }
    side_by_side(cases).await
}

async fn ends_inside(life: Life, at_source: bool, upload: UploadStrategy, cut: Option<Action>) -> Result<()> {
    let env = Env::get();
    let site = Site::start(TokenOptions { expires_in: life.said, lives: life.is, ..TokenOptions::default() }).await?;
    let (name, image) = open_image(&[9 * MIB]).await?;
    let (large, to) = (largest(&image)?, format!("{name}/to"));
    let open = Proxy::to(env, &env.open).start().await?;
    let reads = Matcher::new().method("GET").route(Route::Blob).reference(&large.digest);
    let puts = Matcher::new().method("PUT").route(Route::Upload).reference(&large.digest);
    // Slower than the target, so that nothing piles up on the way there that is lost when it breaks.
    let slow = Action::Throttle { bytes_per_second: 2 << 20 };
    let (source, target, judge) = if at_source {
        site.judge()?.push(&name, "1", &image).await?;
        site.registry.rule(reads.clone().times(1), [slow.clone()].into_iter().chain(cut).collect::<Vec<_>>());
        (&site.registry, &open, client_of(&env.open)?)
    } else {
        site.registry.rule(puts.clone().times(1), cut.into_iter().collect::<Vec<_>>());
        (&open, &site.registry, site.judge()?)
    };
    source.rule(reads.clone(), slow);
    let options = HostOptions { quirks: Some(Quirks { upload, ..Quirks::default() }), ..HostOptions::default() };
    let client = Client::new(ClientOptions { hosts: [(target.host().parse()?, options)].into(), ..cases::options() });
    let user = |proxy: &Proxy| if proxy.host() == open.host() { Ok(open.registry().clone()) } else { site.of("push") };
    let report = copy(&name, &to).with(&client).done(&user(source)?, &user(target)?).await;
    let all = || format!("{}\n{}", lines(source), lines(target));
    report.with_context(all)?;

    let refused = site.statuses(&Matcher::new()).into_iter().filter(|status| *status == 401).count();
    ensure!(if life.is.is_none() { refused == 1 } else { refused > 1 }, "{refused} times 401:{}", all());
    ensure!((2..=12).contains(&site.logins()?.len()), "{:#?}", site.logins()?);
    let gets = matching(source, &reads).into_iter().filter(|get| get.status != Some(401));
    let uploads = matching(target, &Matcher::new().route(Route::Upload)).into_iter();
    let of_large = uploads.filter(|put| put.key.method == "PATCH" || puts.matches(&put.key, &put.path));
    let of_large: Vec<_> = of_large.filter(|put| put.request_bytes > 0).collect();
    let read: u64 = gets.map(|get| get.response_bytes).sum();
    let sent: u64 = of_large.iter().map(|put| put.request_bytes).sum();
    // What was under way at each break, and what was read since the state of the hash was last kept.
    let breaks = of_large.iter().filter(|put| put.status.is_none_or(|status| status >= 400)).count() as u64;
    let whole = large.bytes.len() as u64;
    ensure!(read - whole <= breaks * (3 << 19) && sent - whole <= breaks * (1 << 19), "{read} {sent}:{}", all());
    ensure!(judge.holds(&to, "1", &image).await?, "it is not the same");
    Ok(())
}

/// What went through a proxy, for the reader of a failure.
fn lines(proxy: &Proxy) -> String {
    let line = |exchange: &Exchange| {
        let Exchange { key, status, request_bytes, response_bytes, .. } = exchange;
        format!(
            "\n    {key} {status:?} {} {request_bytes} up, {response_bytes} down",
            exchange.range.as_deref().unwrap_or_default()
        )
    };
    proxy.requests().iter().map(line).collect()
}

#[tokio::test]
async fn a_repository_is_logged_in_to_with_the_longest_entry_and_another_host_with_none() -> Result<()> {
    let mut options = TokenOptions::default();
    options.users.push(User::new("second", "second-password", &["pull", "push"]));
    let anonymous = TokenOptions { anonymous: vec!["pull".into()], ..TokenOptions::default() };
    let (site, other) = (Site::start(options).await?, Site::start(anonymous).await?);
    let image = Image::single(fastrand::u64(..), &[MIB + 1]);
    other.judge()?.push("from", "1", &image).await?;
    let host = site.registry.host();
    let entry = |path: &str, user: &str| -> Result<(String, Value)> {
        let user = site.tokens.endpoint().user(user).context("no such user")?;
        Ok((format!("{host}/{path}"), json!({"username": user.name, "password": user.password})))
    };
    let auths: serde_json::Map<_, _> = [entry("a", "push")?, entry("a/b", "second")?].into_iter().collect();
    let credentials = CredentialStore::from_docker_config_json(json!({"auths": auths}).to_string().as_bytes(), "x")?;
    let at = |proxy: &Proxy| -> Result<Access> {
        Ok(Access { credentials: credentials.clone(), ..access(Env::get(), &proxy.registry().anonymous())? })
    };
    let client = cases::client();
    for (to, user) in [("a/x", Some("push")), ("a/b/x", Some("second")), ("a/b/c/x", Some("second")), ("ab/x", None)] {
        let before = site.logins()?.len();
        let image = cases::image(&at(&other.registry)?, "from", to)?;
        let report = sync_with(&client, at(&other.registry)?, at(&site.registry)?, vec![image]).await?;
        ensure!(report.failed().next().is_none() == user.is_some(), "{to}: {report:?}");
        let logins = site.logins()?.split_off(before);
        ensure!(!logins.is_empty() && logins.iter().all(|login| login.user.as_deref() == user), "{to}: {logins:#?}");
        // What one credential has brought to the registry is not mounted with another one.
        let mounts = logins.iter().any(|login| login.scopes.len() == 2);
        ensure!(mounts == (to == "a/b/c/x"), "{to}: {logins:#?}");
    }
    ensure!(other.logins()?.iter().all(|login| login.user.is_none()), "{:#?}", other.logins()?);
    Ok(())
}
