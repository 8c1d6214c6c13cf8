//! Which credential is used where, and when Secrets are read: what the registries saw, and what the API server did.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use imagemirror::{
    auth::CredentialStore,
    registry::{Access, Client, Proxy as HttpProxy, Repository},
};
use jiff::SignedDuration;
use serde_json::{Value, json};
use testenv::{
    Env, Forwarder, Registry, RegistryOptions, RegistryServer, Tunnel,
    certs::Ca,
    images::Image,
    proxy::{Action, Gate, Matcher, Proxy, Route},
    registry::Auth,
    token::{TokenOptions, TokenServer},
};

use crate::{
    audit::reads,
    cases::{self, access},
    support::{Place, condition, eventually},
};

/// Secrets are waited for so long, and the lease is not lost on a busy machine: after that everything is read again.
fn steady(secret_retry: &str) -> Value {
    json!({"secretRetry": secret_retry, "secretRetryWindow": "1h", "leaseDuration": "1m"})
}

#[tokio::test]
async fn objects_that_wait_for_one_secret_ask_for_it_once() -> Result<()> {
    const OBJECTS: usize = 8;
    let place = Place::new("waiting").await?;
    let (source, target) = (&place.env.source, &place.env.target);
    place.push(source, "agent", "1", &Image::single(421, &[1000])).await?;
    let every = Duration::from_secs(1);
    let _operator = place.operator_with(&steady("1s"), "debug")?;
    let mut spec = place.spec(source, target, &[("agent", &["1"])]);
    spec["imagePullSecrets"] = json!([{"name": "later"}]);
    let names: Vec<String> = (0..OBJECTS).map(|number| format!("m{number}")).collect();
    for name in &names {
        spec["target"]["repository"] = json!(format!("{}/{name}", place.prefix));
        place.apply(name, &spec).await?;
    }
    for name in &names {
        place.until_reason(name, "SecretNotFound").await?;
    }
    let count = || Ok::<_, anyhow::Error>(reads(place.env, &place.namespace, "later")?.len());
    // Each run has read it; from here on nothing but waiting does.
    let before = count()?;
    eventually("four more looks", || async { Ok(count()? >= before + 4) }).await?;
    let looks = reads(place.env, &place.namespace, "later")?.split_off(before);
    let gaps: Vec<SignedDuration> = looks.windows(2).map(|pair| pair[1].duration_since(pair[0])).collect();
    // Between the answer to one question and the next question; a busy machine makes it longer, never shorter.
    let least = SignedDuration::try_from(every.mul_f64(0.9))?;
    ensure!(gaps.iter().all(|gap| *gap >= least), "{gaps:?}");
    for other in ["push", "ca"] {
        let gaps = reads(place.env, &place.namespace, other)?.split_off(OBJECTS);
        let is_near = gaps.windows(2).any(|pair| pair[1].duration_since(pair[0]) < least);
        ensure!(!is_near, "{other}: {gaps:?}");
    }
    let before = count()?;
    place.pull_secret("later", &[source]).await?;
    for name in &names {
        place.until_ready(name).await?;
    }
    // One look that finds it, perhaps one that came too early, and each run's own.
    let after = count()? - before;
    ensure!((OBJECTS + 1..=OBJECTS + 3).contains(&after), "{after} reads");
    Ok(())
}

#[tokio::test]
async fn a_missing_secret_that_nothing_needs_is_noticed_when_it_comes() -> Result<()> {
    let place = Place::new("spare").await?;
    let (source, target) = (&place.env.source, &place.env.target);
    place.push(source, "agent", "1", &Image::single(422, &[1000])).await?;
    let _operator = place.operator()?;
    let mut spec = place.spec(source, target, &[("agent", &["1"])]);
    spec["imagePullSecrets"] = json!([{"name": "pull"}, {"name": "spare"}]);
    place.apply("m", &spec).await?;
    let resolved = |state: &'static str, reason: &'static str| {
        place.until("m", "CredentialsResolved", move |status| {
            condition(status, "Ready") == ("True", "Succeeded")
                && condition(status, "CredentialsResolved") == (state, reason)
        })
    };
    resolved("False", "SecretNotFound").await?;
    place.pull_secret("spare", &[source]).await?;
    resolved("True", "Succeeded").await?;
    Ok(())
}

#[tokio::test]
async fn what_waits_for_a_secret_goes_on_at_once_where_secrets_are_watched() -> Result<()> {
    let place = Place::new("watched").await?;
    place.watch_secrets()?;
    let (source, target) = (&place.env.source, &place.env.target);
    let image = Image::single(423, &[1000]);
    place.push(source, "agent", "1", &image).await?;
    // Nobody would look again within the patience of a test.
    let config = json!({"secrets": {"watch": true}});
    let timing = json!({"secretRetry": "200ms", "secretRetryMax": "1h", "leaseDuration": "1m"});
    let _operator = place.operator_from(config, &timing, "debug")?;
    let mut spec = place.spec(source, target, &[("agent", &["1"])]);
    spec["imagePullSecrets"] = json!([{"name": "later"}]);
    place.apply("m", &spec).await?;
    place.until_reason("m", "SecretNotFound").await?;
    // One that nobody waits for causes no look at the one that is missing.
    let before = reads(place.env, &place.namespace, "later")?.len();
    place.pull_secret("other", &[source]).await?;
    place.pull_secret("later", &[source]).await?;
    place.until_ready("m").await?;
    let after = reads(place.env, &place.namespace, "later")?.len();
    ensure!(after - before <= 4, "{} reads", after - before);
    // One that is wrong is put right.
    place.secret("pull", "Opaque", &[("x", "y")]).await?;
    let mut spec = place.spec(source, target, &[("agent", &["1"])]);
    spec["target"]["repository"] = json!(place.repository("another"));
    place.apply("n", &spec).await?;
    place.until_reason("n", "SecretInvalid").await?;
    place.pull_secret("pull", &[source]).await?;
    place.until_ready("n").await?;
    ensure!(place.holds(target, "agent", "1", &image).await?);
    Ok(())
}

#[tokio::test]
async fn a_bundle_of_certificates_is_trusted_for_every_registry() -> Result<()> {
    let place = Place::new("bundle").await?;
    let (source, target) = (&place.env.source, &place.env.target);
    place.push(source, "agent", "1", &Image::single(424, &[1000])).await?;
    let mut spec = place.spec(source, target, &[("agent", &["1"])]);
    spec["registries"] = json!([]);
    let networks = json!({"allow": ["127.0.0.0/8", "::1"]});
    let operator = place.operator_from(json!({"networks": networks}), &json!({}), "debug")?;
    place.apply("m", &spec).await?;
    place.until_reason("m", "CertificateInvalid").await?;
    drop(operator);
    // One host has a CA of its own beside it, which is another; and an object that shows a certificate keeps the bundle.
    let other = Ca::generate()?;
    let (own, key) = (place.env.run_dir.join("bundle-own.pem"), place.env.run_dir.join("bundle-own.key"));
    other.save(&own, &key)?;
    let registries = json!([{"host": target.host, "caFile": own}]);
    let config = json!({"caFile": place.env.ca_path, "registries": registries, "networks": networks});
    let _operator = place.operator_from(config, &json!({}), "debug")?;
    place.until_ready("m").await?;
    let client = other.client("m", "m")?;
    client.save(&own.with_extension("crt"), &key)?;
    let (chain, key) = (std::fs::read_to_string(own.with_extension("crt"))?, std::fs::read_to_string(&key)?);
    place.secret("client", "Opaque", &[("tls.crt", &chain), ("tls.key", &key)]).await?;
    spec["registries"] = json!([{"host": source.host, "certSecretRef": {"name": "client"}}]);
    spec["target"]["repository"] = json!(place.repository("another"));
    place.apply("n", &spec).await?;
    place.until_ready("n").await?;
    Ok(())
}

#[tokio::test]
async fn a_password_that_is_replaced_during_a_run_is_read_again_after_a_401() -> Result<()> {
    let place = Place::new("rotated").await?;
    let users = |password: &str| vec![("puller".to_owned(), password.to_owned())];
    let auth = Auth::Htpasswd(users("before-the-run"));
    let options = RegistryOptions { name: "rotated".into(), auth, ..RegistryOptions::default() };
    let server = RegistryServer::start(place.env, options).await?;
    let source = Proxy::to(place.env, server.registry()).start().await?;
    let images = ["1", "2"].map(|tag| (tag, Image::single(fastrand::u64(..), &[100_000])));
    for (tag, image) in &images {
        place.push(server.registry(), "agent", tag, image).await?;
    }
    place.pull_secret("pull", &[source.registry()]).await?;
    let operator = place.operator_with(&steady("5m"), "debug")?;
    // Every manifest has been let out when the password changes, and no layer.
    let gate = Gate::new();
    source.rule(Matcher::new().method("GET").route(Route::Manifest), Action::GateAnswer(gate.clone()));
    place.apply("m", &place.spec(source.registry(), &place.env.target, &[("agent", &["1", "2"])])).await?;
    gate.arrived(2).await?;
    server.set_users(&users("within-the-run"))?;
    place.pull_secret("pull", &[&source.registry().with_credentials("puller", "within-the-run")]).await?;
    gate.open();
    place.until_ready("m").await?;
    for (tag, image) in &images {
        ensure!(place.holds(&place.env.target, "agent", tag, image).await?, "{tag}");
    }
    let refused =
        source.requests().iter().filter(|exchange| exchange.authorized && exchange.status == Some(401)).count();
    ensure!(refused > 0, "nothing was refused");
    // It is one run, with two looks: at its start, and after the refusal.
    let looks = reads(place.env, &place.namespace, "pull")?;
    ensure!(looks.len() == 2, "{looks:?}");
    ensure!(operator.logged()?.matches("run ended").count() == 1);
    let failed = |status: &Value| status["conditions"].to_string().contains("AuthenticationFailed");
    ensure!(!place.statuses.seen("m").iter().any(failed), "it was said to have failed");
    Ok(())
}

#[tokio::test]
async fn a_refused_password_is_looked_at_once_more_and_then_waits() -> Result<()> {
    let place = Place::new("stale").await?;
    let source = &place.env.source;
    place.pull_secret("pull", &[&source.with_credentials("puller", "stale")]).await?;
    let _operator = place.operator_with(&steady("5m"), "debug")?;
    place.apply("m", &place.spec(source, &place.env.target, &[("agent", &["1"])])).await?;
    place.until_reason("m", "AuthenticationFailed").await?;
    let looks = reads(place.env, &place.namespace, "pull")?;
    ensure!(looks.len() == 2, "{looks:?}");
    Ok(())
}

#[tokio::test]
async fn after_a_401_the_next_match_is_tried_and_the_service_accounts_come_last() -> Result<()> {
    let place = Place::new("next").await?;
    let source = Proxy::to(place.env, &place.env.source).start().await?;
    let image = Image::single(424, &[1000]);
    place.push(&place.env.source, "agent", "1", &image).await?;
    let users = ["first", "second", "third"];
    for user in users {
        place.pull_secret(user, &[&source.registry().with_credentials(user, "stale")]).await?;
    }
    place.pull_secret("pull", &[source.registry()]).await?;
    place.kubectl(&["create", "serviceaccount", "puller"])?;
    let secrets = json!({"imagePullSecrets": [{"name": "third"}, {"name": "pull"}]}).to_string();
    place.kubectl(&["patch", "serviceaccount", "puller", "-p", &secrets])?;
    let _operator = place.operator()?;
    let mut spec = place.spec(source.registry(), &place.env.target, &[("agent", &["1"])]);
    spec["imagePullSecrets"] = json!([{"name": "first"}, {"name": "second"}]);
    spec["serviceAccountName"] = json!("puller");
    place.apply("m", &spec).await?;
    place.until_ready("m").await?;
    let mut shown: Vec<String> = Vec::new();
    for exchange in source.requests().iter().filter(|exchange| exchange.authorized) {
        let value = exchange.headers.get("Authorization").context("no Authorization")?.to_str()?;
        let user = basic_user(value)?;
        if shown.last() != Some(&user) {
            shown.push(user);
        }
    }
    let last = place.env.source.username.clone().unwrap_or_default();
    ensure!(shown == ["first", "second", "third", last.as_str()], "{shown:?}");
    Ok(())
}

fn basic_user(header: &str) -> Result<String> {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let pair = STANDARD.decode(header.strip_prefix("Basic ").context("not Basic")?)?;
    Ok(String::from_utf8(pair)?.split(':').next().unwrap_or_default().to_owned())
}

#[tokio::test]
async fn one_host_is_read_from_and_written_to_with_different_logins() -> Result<()> {
    let place = Place::new("same-host").await?;
    let target = &place.env.target;
    let image = Image::single(425, &[1_100_000]);
    place.push(target, "from", "1", &image).await?;
    let user = place.env.token.user("pull").context("no user pull")?;
    place.pull_secret("pull", &[&target.with_credentials(&user.name, &user.password)]).await?;
    let _operator = place.operator()?;
    let before = place.env.token.requests()?.len();
    let mut spec = place.spec(target, target, &[("from", &["1"])]);
    spec["target"]["repository"] = json!(format!("{}/to", place.prefix));
    place.apply("m", &spec).await?;
    place.until_ready("m").await?;
    ensure!(place.holds(target, "to", "1", &image).await?);
    let logins = place.env.token.requests()?.split_off(before);
    let users_of = |name: &str| -> BTreeSet<String> {
        let about = format!("repository:{}:", place.repository(name));
        let of_it = logins.iter().filter(|login| login.scopes.iter().any(|scope| scope.starts_with(&about)));
        // The judge of `holds` logs in, too, as the user who pushes, and asks for everything.
        let of_it = of_it.filter(|login| !login.scopes.iter().any(|scope| scope.contains("delete")));
        of_it.map(|login| login.user.clone().unwrap_or_default()).collect()
    };
    ensure!(users_of("from") == ["pull".to_owned()].into(), "{logins:#?}");
    ensure!(users_of("to") == ["push".to_owned()].into(), "{logins:#?}");
    Ok(())
}

/// A registry behind a line that counts connections, with a token server.
struct Counted {
    tokens: TokenServer,
    _server: RegistryServer,
    line: Forwarder,
    registry: Registry,
}

impl Counted {
    async fn start(env: &Env) -> Result<Self> {
        let tokens = TokenServer::start(&env.ca()?, &env.log("counted-tokens"), TokenOptions::default()).await?;
        let auth = tokens.endpoint().auth();
        let server =
            RegistryServer::start(env, RegistryOptions { name: "counted".into(), auth, ..RegistryOptions::default() })
                .await?;
        let line = Forwarder::to(server.host()).start().await?;
        let user = tokens.endpoint().user("push").context("no user push")?;
        let registry = server.registry().at(&line.host()).with_credentials(&user.name, &user.password);
        testenv::Client::new(env, &registry)?.push("a", "1", &Image::single(426, &[])).await?;
        Ok(Self { tokens, _server: server, line, registry })
    }

    /// Connections and tokens so far.
    fn costs(&self) -> Result<(usize, usize)> {
        Ok((self.line.accepted(), self.tokens.endpoint().requests()?.len()))
    }
}

/// What makes a tenant's way to the registry its own.
type Change<'a> = Box<dyn Fn(&Counted, &mut Access) -> Result<()> + 'a>;

#[tokio::test]
async fn tenants_share_connections_and_tokens_only_where_everything_is_equal() -> Result<()> {
    let env = cases::env();
    let tunnels = [Tunnel::start(Some(("tenant", "one"))).await?, Tunnel::start(Some(("tenant", "two"))).await?];
    let through = |tunnel: &Tunnel, password: &str| -> Result<Option<Arc<HttpProxy>>> {
        let login = ("tenant".to_owned(), password.to_owned().into());
        Ok(Some(Arc::new(HttpProxy::new(&tunnel.url(), Some(login))?)))
    };
    let base = |counted: &Counted| access(env, &counted.registry);
    let (one, other) = (env.ca()?.client("tenant", "one")?, env.ca()?.client("tenant", "two")?);
    let two_cas = format!("{}{}", env.ca_pem, Ca::generate()?.cert_pem());
    let identity = |identity: &testenv::certs::Identity| -> Change<'_> {
        let (chain, key) = (identity.cert_pem.clone(), identity.key_pem.clone());
        Box::new(move |_, access| {
            access.transport.identity =
                Some((chain.clone().into_bytes().into(), Arc::new(key.clone().into_bytes().into())));
            Ok(())
        })
    };
    let same = || -> Change<'_> { Box::new(|_, _| Ok(())) };
    let cases: Vec<(&str, Change<'_>, Change<'_>, bool)> = vec![
        ("the same", same(), same(), true),
        (
            "another CA",
            same(),
            Box::new(|_, access| {
                access.transport.ca = Some(two_cas.clone().into_bytes().into());
                Ok(())
            }),
            false,
        ),
        ("a client certificate", same(), identity(&one), false),
        ("another client certificate", identity(&one), identity(&other), false),
        (
            "a proxy",
            same(),
            Box::new(|_, access| {
                access.transport.proxy = through(&tunnels[0], "one")?;
                Ok(())
            }),
            false,
        ),
        (
            "another login at the proxy",
            Box::new(|_, access| {
                access.transport.proxy = through(&tunnels[0], "one")?;
                Ok(())
            }),
            Box::new(|_, access| {
                access.transport.proxy = through(&tunnels[1], "two")?;
                Ok(())
            }),
            false,
        ),
        (
            "another password",
            same(),
            Box::new(|counted, access| {
                let user = counted.tokens.endpoint().user("pull").context("no user pull")?;
                let registry = counted.registry.with_credentials(&user.name, &user.password);
                access.credentials =
                    CredentialStore::from_docker_config_json(registry.dockerconfigjson().as_bytes(), "x")?;
                Ok(())
            }),
            false,
        ),
    ];
    for (what, first, second, is_shared) in cases {
        let counted = Counted::start(env).await?;
        let client: Client = cases::client();
        let mut costs = vec![counted.costs()?];
        for change in [&first, &second, &first] {
            let mut access = base(&counted)?;
            change(&counted, &mut access)?;
            let repository = Repository::for_pull(&client, &access, "a".parse()?)?;
            ensure!(repository.head("1").await?.is_some(), "{what}");
            costs.push(counted.costs()?);
        }
        let news: Vec<(bool, bool)> =
            costs.windows(2).map(|pair| (pair[1].0 > pair[0].0, pair[1].1 > pair[0].1)).collect();
        let of_second = (!is_shared, !is_shared);
        ensure!(news == [(true, true), of_second, (false, false)], "{what}: {costs:?}");
    }
    Ok(())
}
