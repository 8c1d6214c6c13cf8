//! The token server in the forms that registries have it: tokens by GET and by OAuth, with limits on what it grants.

use std::time::Duration;

use serde_json::Value;
use testenv::proxy::{Action, Matcher, Proxy};
use testenv::token::{TokenOptions, TokenServer};
use testenv::{Env, Image, RegistryOptions, RegistryServer};

use crate::{client, raw, repository};

async fn server(options: TokenOptions) -> TokenServer {
    let env = Env::get();
    TokenServer::start(&env.ca().unwrap(), &env.log("tokens"), options).await.unwrap()
}

/// Status and answer of a form, whose fields are given as a query.
async fn post(server: &TokenServer, form: &str) -> (u16, Value) {
    let request = raw().post(&server.endpoint().url).header("Content-Type", "application/x-www-form-urlencoded");
    let answer = request.body(form.to_owned()).send().await.unwrap();
    (answer.status().as_u16(), serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap())
}

/// The `access` of the answer's token as `NAME:ACTIONS`.
fn access(answer: &Value) -> Vec<String> {
    use base64::Engine;
    let claims = answer["access_token"].as_str().unwrap().split('.').nth(1).unwrap();
    let claims = base64::prelude::BASE64_URL_SAFE_NO_PAD.decode(claims).unwrap();
    let claims: Value = serde_json::from_slice(&claims).unwrap();
    let one = |entry: &Value| {
        let actions: Vec<&str> = entry["actions"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        format!("{}:{}", entry["name"].as_str().unwrap(), actions.join(","))
    };
    claims["access"].as_array().unwrap().iter().map(one).collect()
}

async fn get(server: &TokenServer, query: &str) -> Value {
    let user = server.endpoint().user("push").unwrap();
    let url = format!("{}?service=testenv&{query}", server.endpoint().url);
    let answer = raw().get(url).basic_auth(&user.name, Some(&user.password)).send().await.unwrap();
    serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap()
}

#[tokio::test]
async fn oauth2_gives_tokens_for_a_password_and_for_a_refresh_token() {
    let server = server(TokenOptions { oauth2: true, expires_in: 2, ..Default::default() }).await;
    let form = "service=testenv&client_id=me&scope=repository:a:pull,push%20repository:b:pull";
    let password = "grant_type=password&username=pull&password=pull-password-0815";
    let (status, answer) = post(&server, &format!("{form}&{password}")).await;
    assert_eq!((status, &answer["expires_in"]), (200, &Value::from(2)));
    assert_eq!(access(&answer), ["a:pull", "b:pull"]);
    assert_eq!(answer["scope"], "repository:a:pull repository:b:pull");
    assert_eq!((&answer["token"], &answer["refresh_token"]), (&Value::Null, &Value::Null));

    let (_, answer) = post(&server, &format!("{form}&{password}&access_type=offline")).await;
    let refresh = answer["refresh_token"].as_str().unwrap();
    let (status, answer) = post(&server, &format!("{form}&grant_type=refresh_token&refresh_token={refresh}")).await;
    assert_eq!((status, access(&answer)), (200, vec!["a:pull".to_owned(), "b:pull".to_owned()]));

    let (status, _) = post(&server, &format!("{form}&grant_type=refresh_token&refresh_token=wrong")).await;
    assert_eq!(status, 401);
    assert_eq!(post(&server, &format!("{form}&grant_type=authorization_code")).await.0, 400);
    assert_eq!(post(&server, &format!("service=testenv&{password}")).await.1["error"], "invalid_request");

    let requests = server.endpoint().requests().unwrap();
    let seen: Vec<_> =
        requests.iter().map(|r| (r.grant_type.as_deref().unwrap(), r.user.as_deref(), r.offline)).collect();
    assert_eq!(
        seen[..4],
        [
            ("password", Some("pull"), false),
            ("password", Some("pull"), true),
            ("refresh_token", Some("pull"), false),
            ("refresh_token", Some("<token>"), false),
        ]
    );
    assert!(requests.iter().all(|request| request.method == "POST"));
    let log = std::fs::read_to_string(&server.endpoint().log).unwrap();
    assert!(!log.contains("pull-password") && !log.contains(refresh));
}

#[tokio::test]
async fn a_refresh_token_that_rotates_is_good_for_one_login() {
    let server = server(TokenOptions { oauth2: true, rotates: true, ..Default::default() }).await;
    let login = |token: String| {
        let form = format!("service=testenv&client_id=me&grant_type=refresh_token&refresh_token={token}");
        let server = &server;
        async move { post(server, &form).await }
    };
    let first = server.refresh_token("pull");
    let (status, answer) = login(first.clone()).await;
    assert_eq!((status, login(first).await.0), (200, 401));
    assert_eq!(login(answer["refresh_token"].as_str().unwrap().to_owned()).await.0, 200);
}

#[tokio::test]
async fn a_registry_refuses_a_token_at_its_end_and_not_before() {
    let server = server(TokenOptions { lives: Some(1), ..Default::default() }).await;
    let options = RegistryOptions { auth: server.endpoint().auth(), ..Default::default() };
    let registry = RegistryServer::start(Env::get(), options).await.unwrap();
    let started = std::time::Instant::now();
    let token = get(&server, "scope=repository:a:pull").await["token"].as_str().unwrap().to_owned();
    let url = format!("{}/v2/a/tags/list", registry.registry().url());
    while raw().get(&url).bearer_auth(&token).send().await.unwrap().status() != 401 {
        assert!(started.elapsed() < Duration::from_secs(10), "it lives on");
    }
    assert!(started.elapsed() >= Duration::from_secs(1), "{:?}", started.elapsed());
}

#[tokio::test]
async fn an_identity_token_logs_in_by_get_too() {
    let server = server(TokenOptions { oauth2: true, ..Default::default() }).await;
    let options = RegistryOptions { auth: server.endpoint().auth(), ..Default::default() };
    let registry = RegistryServer::start(Env::get(), options).await.unwrap();
    let registry = registry.registry().with_credentials("<token>", &server.refresh_token("push"));
    client(&registry).push("some/repository", "latest", &Image::single(1, &[100])).await.unwrap();
    assert_eq!(server.endpoint().requests().unwrap()[0].user.as_deref(), Some("push"));
}

#[tokio::test]
async fn a_get_gives_a_refresh_token_to_those_who_ask() {
    let server = server(TokenOptions { oauth2: true, ..Default::default() }).await;
    assert!(get(&server, "").await["refresh_token"].is_null());
    assert!(get(&server, "offline_token=true").await["refresh_token"].is_string());
}

#[tokio::test]
async fn without_oauth2_a_post_is_not_found() {
    let server = server(TokenOptions::default()).await;
    assert_eq!(post(&server, "grant_type=password").await.0, 404);
    let requests = server.endpoint().requests().unwrap();
    assert_eq!((requests[0].method.as_str(), requests[0].status), ("POST", 404));
}

#[tokio::test]
async fn fewer_scopes_are_granted_than_asked() {
    let two = "scope=repository:a:pull&scope=repository:b:pull";
    let first = server(TokenOptions { first_scope_only: true, ..Default::default() }).await;
    assert_eq!(access(&get(&first, two).await), ["a:pull"]);
    assert_eq!(first.endpoint().requests().unwrap()[0].scopes, ["repository:a:pull"]);
    let some = server(TokenOptions { repositories: Some(vec!["b".to_owned()]), ..Default::default() }).await;
    assert_eq!(access(&get(&some, two).await), ["b:pull"]);
    assert_eq!(some.endpoint().requests().unwrap()[0].scopes.len(), 2);
}

#[tokio::test]
async fn a_proxy_makes_the_token_server_fail() {
    let env = Env::get();
    let server = server(TokenOptions::default()).await;
    let proxy = Proxy::to_tokens(env, server.endpoint()).start().await.unwrap();
    let options = RegistryOptions { auth: server.endpoint().at(&proxy.url()).auth(), ..Default::default() };
    let registry = RegistryServer::start(env, options).await.unwrap();
    let user = server.endpoint().user("push").unwrap();
    let registry = registry.registry().with_credentials(&user.name, &user.password);
    proxy.rule(Matcher::new().times(1), [Action::Delay(Duration::from_millis(10)), Action::respond(503)]);
    let repository = repository("tokens");
    let error = client(&registry).tags(&repository).await.unwrap_err().to_string();
    assert!(error.contains(&proxy.host()) && error.contains("503"), "{error}");
    assert!(client(&registry).tags(&repository).await.unwrap().is_empty());
    assert_eq!(server.endpoint().requests().unwrap().len(), 1);
}
