//! `imagemirror check`: which login is used where and why it fails, with nothing left behind and no secret shown.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use testenv::{
    Image, Registry, RegistryOptions, RegistryServer,
    proxy::{Action, Matcher, Proxy},
    registry::{Auth, Kind},
};

use crate::{
    golden::{Session, file, mirror, secrets},
    plugin::Plugin,
    support::Place,
};

const DOCKER_CONFIG: &str = "kubernetes.io/dockerconfigjson";

fn login(place: &Place, name: &str, entries: &[(&str, &str, &str)]) -> Value {
    let auths: serde_json::Map<String, Value> = entries
        .iter()
        .map(|(key, user, password)| ((*key).to_owned(), json!({"username": user, "password": password})))
        .collect();
    place.document(name, DOCKER_CONFIG, &[(".dockerconfigjson", &json!({"auths": auths}).to_string())])
}

fn password(registry: &Registry) -> Result<&str> {
    registry.password.as_deref().context("a password")
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_to_fail_is_told_apart() -> Result<()> {
    let place = Place::new("check").await?;
    let (source, target) = (&place.env.source, &place.env.target);
    place.push(source, "agent", "1", &Image::single(601, &[10])).await?;
    let realm = Proxy::to(place.env, source).start().await?;
    let elsewhere = r#"Bearer realm="https://u:hunter2@localhost:1/token?x=hunter2",service="x""#;
    realm.rule(Matcher::new(), Action::respond(401).header("WWW-Authenticate", elsewhere));
    let open = &place.env.open;
    place.push(open, "agent", "1", &Image::single(601, &[10])).await?;
    let [pull, push, ca] = secrets(&place);
    let spec = place.spec(source, target, &[("agent", &["1"])]);
    let with = |pointer: &str, value: Value| {
        let mut spec = spec.clone();
        if let Some(field) = spec.pointer_mut(pointer) {
            *field = value;
        }
        spec
    };
    let at = |host: &str| {
        let mut spec = with("/images/0/source", json!(format!("{host}/{}:1", place.repository("agent"))));
        spec["images"][0]["tags"].take();
        spec["registries"][0]["host"] = json!(host);
        spec["images"][0].as_object_mut().map(|image| image.remove("tags"));
        spec
    };
    let (right, team) = (password(source)?, format!("{}/{}", source.host, place.prefix));
    let two = [(&*team, "robot$team", "wrong-hunter2"), (&source.host, "puller", right)];
    let reader = place.env.token.user("pull").context("a reader")?;
    let list =
        json!([{"source": format!("{}/{}", source.host, place.repository("agent")), "select": {"pattern": ".*"}}]);
    let mut without_tls = at(&open.host);
    without_tls["registries"][0] = json!({"host": open.host, "plainHTTP": true});
    let cases = [
        ("right", spec.clone(), vec![pull.clone(), push.clone()], 0),
        ("wrong", spec.clone(), vec![login(&place, "pull", &[(&source.host, "puller", "hunter2")]), push.clone()], 1),
        ("anonymous", spec.clone(), vec![login(&place, "pull", &[("gcr.io/other", "u", "p")]), push.clone()], 1),
        ("two", spec.clone(), vec![login(&place, "pull", &two), push.clone()], 0),
        (
            "reader",
            spec.clone(),
            vec![pull.clone(), login(&place, "push", &[(&target.host, &reader.name, &reader.password)])],
            1,
        ),
        ("missing", spec.clone(), vec![push.clone()], 1),
        ("entry", spec.clone(), vec![pull.clone(), login(&place, "push", &[("gcr.io", "u", "p")])], 1),
        ("tags", with("/images", list), vec![pull.clone(), push.clone()], 0),
        ("tag", with("/images/0/tags", json!(["2"])), vec![pull.clone(), push.clone()], 1),
        ("realm", at(&realm.host()), vec![login(&place, "pull", &[(&realm.host(), "u", "hunter2")]), push.clone()], 1),
        ("open", without_tls, vec![login(&place, "pull", &[(&open.host, "u", "hunter2")]), push.clone()], 0),
        ("unreachable", at("127.0.0.1:1"), vec![pull.clone(), push.clone()], 1),
        ("certificate", with("/registries", json!([])), vec![pull.clone(), push.clone()], 1),
    ];
    let mut session = Session::new(&place)?;
    for (name, spec, secrets, code) in cases {
        let name = file(&place, name, &[&[mirror(&place, &spec)][..], &secrets, std::slice::from_ref(&ca)].concat())?;
        session.imagemirror(&format!("check -f {name}"))?;
        ensure!(session.text.trim_end().ends_with(&format!("[{code}]")), "{name}:{}", session.text);
        let json = session.imagemirror(&format!("check -o json -f {name}"))?;
        let report: Value = serde_json::from_str(&json)?;
        let found = report["mirrors"][0]["repositories"].as_array().context("repositories")?;
        let failed = found.iter().any(|repository| !repository["failure"].is_null());
        ensure!(found.len() == 2 && failed == (code == 1), "{name}: {report:#}");
        // The screen shows the text alone.
        let begin = session.text.rfind("$ imagemirror").unwrap_or_default();
        session.text.truncate(begin);
        ensure!(!json.contains("hunter2"), "a password is printed: {json}");
    }
    for secret in ["hunter2", right, &reader.password] {
        ensure!(!session.text.contains(secret), "{secret} is printed: {}", session.text);
    }
    session.check("check")
}

/// A target, and what a push is tried with there.
#[tokio::test(flavor = "multi_thread")]
async fn whether_a_push_would_work_is_found_out_without_a_trace() -> Result<()> {
    let place = Place::new("check-push").await?;
    let env = place.env;
    place.push(&env.source, "agent", "1", &Image::single(602, &[10])).await?;
    let users = vec![("opaque".to_owned(), "opaque-password".to_owned())];
    let opaque = RegistryOptions {
        name: "opaque".into(),
        kind: Kind::Olareg,
        auth: Auth::Opaque(users.clone()),
        ..RegistryOptions::default()
    };
    let basic = RegistryOptions { name: "basic".into(), auth: Auth::Htpasswd(users), ..RegistryOptions::default() };
    let (opaque, basic) = (RegistryServer::start(env, opaque).await?, RegistryServer::start(env, basic).await?);
    for (what, registry, opens) in
        [("a JWT", &env.target, false), ("a password", basic.registry(), true), ("opaque", opaque.registry(), true)]
    {
        let proxy = Proxy::to(env, registry).start().await?;
        let spec = place.spec(&env.source, proxy.registry(), &[("agent", &["1"])]);
        let [pull, _, ca] = secrets(&place);
        let config = proxy.registry().dockerconfigjson();
        let push = place.document("push", DOCKER_CONFIG, &[(".dockerconfigjson", &config)]);
        let name = file(&place, "push", &[mirror(&place, &spec), pull, push, ca])?;
        let mut session = Session::new(&place)?;
        session.imagemirror(&format!("check -f {name}"))?;
        ensure!(session.text.contains("push   works\n"), "{what}: {}", session.text);
        let asked = proxy.requests();
        let is_read = |method: &str| matches!(method, "GET" | "HEAD");
        let writes: Vec<(String, u16)> = asked
            .iter()
            .filter(|exchange| !is_read(exchange.key.method.as_ref()))
            .map(|exchange| (exchange.key.method.to_string(), exchange.status.unwrap_or_default()))
            .collect();
        let given_up = writes.last().is_some_and(|(method, status)| method == "DELETE" && *status < 300);
        let expected = if opens {
            writes.len() == 2 && writes[0] == ("POST".to_owned(), 202) && given_up
        } else {
            writes.is_empty()
        };
        ensure!(expected, "{what}: {writes:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_plugin_says_which_secret_of_the_cluster_is_missing() -> Result<()> {
    let place = Place::new("check-plugin").await?;
    let (source, target) = (&place.env.source, &place.env.target);
    place.push(source, "agent", "1", &Image::single(603, &[10])).await?;
    let plugin = Plugin::new(&place)?;
    let mut session = Session::new(&place)?;
    let here = format!("-n {}", place.namespace);
    let mut spec = place.spec(source, target, &[("agent", &["1"])]);
    place.apply("datadog", &spec).await?;
    plugin.show(&mut session, &format!("check datadog {here}"))?;
    spec["imagePullSecrets"] = json!([{"name": "gone"}]);
    place.apply("datadog", &spec).await?;
    plugin.show(&mut session, &format!("check datadog {here}"))?;
    plugin.show(&mut session, &format!("check none {here}"))?;
    // With an identity: that of the operator is nobody else's, and what Google trusts is in the operator's configuration.
    spec["imagePullSecrets"] = json!([{"name": "pull"}]);
    spec["target"] = json!({"registry": "gcr.io", "repository": "team/{name}"});
    spec["registries"].as_array_mut().context("registries")?.push(json!({"host": "gcr.io", "provider": "gcp"}));
    place.apply("identity", &spec).await?;
    plugin.show(&mut session, &format!("check identity {here}"))?;
    spec["serviceAccountName"] = json!("default");
    place.apply("identity", &spec).await?;
    plugin.show(&mut session, &format!("check identity {here}"))?;
    plugin.show(&mut session, &format!("check identity --gcp-workload-identity cluster {here}"))?;
    session.check("plugin-check")
}
