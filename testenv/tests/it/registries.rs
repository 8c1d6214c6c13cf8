//! Every registry takes an image, and lets in whom it should.

use testenv::registry::{Auth, Kind, RegistryOptions};
use testenv::token::{TokenOptions, TokenServer};
use testenv::{Env, Image, Registry, RegistryServer};

use crate::{client, image, repository};

async fn takes(registry: &Registry, image: &Image) {
    let (client, repository) = (client(registry), repository("takes"));
    assert_eq!(client.digest_of(&repository, "latest").await.unwrap(), None);
    client.push(&repository, "latest", image).await.unwrap();
    assert_eq!(client.digest_of(&repository, "latest").await.unwrap().as_deref(), Some(image.digest()));
    assert!(client.holds(&repository, "latest", image).await.unwrap());
    assert_eq!(client.tags(&repository).await.unwrap(), ["latest"]);
}

#[tokio::test]
async fn every_registry_of_the_environment_takes_an_image() {
    let env = Env::get();
    for registry in [&env.source, &env.target, &env.open] {
        takes(registry, &image()).await;
        takes(registry, &Image::docker(fastrand::u64(..), &[1000], &["linux/amd64", "linux/arm/v7"])).await;
        takes(registry, &Image::single(fastrand::u64(..), &[1000])).await;
    }
}

#[tokio::test]
async fn olareg_and_crane_take_an_image() {
    for (kind, tls) in [(Kind::Olareg, true), (Kind::Olareg, false), (Kind::Crane, false)] {
        let options = RegistryOptions { name: format!("{kind:?}"), kind, tls, ..Default::default() };
        let server = RegistryServer::start(Env::get(), options).await.unwrap();
        takes(server.registry(), &image()).await;
        server.stop().await.unwrap();
    }
}

#[tokio::test]
async fn olareg_lets_in_its_users_with_passwords_and_with_opaque_tokens() {
    let users = vec![("me".to_owned(), "secret".to_owned())];
    for (tls, auth) in
        [(true, Auth::Htpasswd(users.clone())), (true, Auth::Opaque(users.clone())), (false, Auth::Opaque(users))]
    {
        let options =
            RegistryOptions { name: "olareg".to_owned(), kind: Kind::Olareg, tls, auth, ..Default::default() };
        let server = RegistryServer::start(Env::get(), options).await.unwrap();
        takes(server.registry(), &image()).await;
        for other in [server.registry().with_credentials("me", "wrong"), server.registry().anonymous()] {
            let refused = client(&other).tags("any").await.unwrap_err().to_string();
            // 403 is what its token server says to a wrong password.
            assert!(refused.contains("401") || refused.contains("403"), "{refused}");
        }
    }
}

#[tokio::test]
async fn the_old_distribution_takes_an_image_lets_in_its_users_and_logs() {
    for (tls, disk) in [(true, false), (false, true)] {
        let auth = Auth::Htpasswd(vec![("me".to_owned(), "secret".to_owned())]);
        let kind = Kind::Distribution2;
        let options = RegistryOptions { name: "old".to_owned(), kind, tls, disk, auth, ..Default::default() };
        let server = RegistryServer::start(Env::get(), options).await.unwrap();
        takes(server.registry(), &image()).await;
        takes(server.registry(), &Image::docker(fastrand::u64(..), &[1000], &["linux/amd64", "linux/arm/v7"])).await;
        let refused = client(&server.registry().with_credentials("me", "wrong")).tags("any").await.unwrap_err();
        assert!(refused.to_string().contains("401"), "{refused}");
        let log = server.registry().access_log().unwrap();
        assert!(log.iter().any(|access| access.method == "PUT" && access.status == 201), "{log:?}");
    }
}

#[tokio::test]
async fn a_registry_on_disk_takes_an_image_and_its_configuration_can_be_extended() {
    let options = RegistryOptions {
        disk: true,
        tls: false,
        extra: serde_json::json!({ "http": { "headers": { "X-Test": ["yes"] } } }),
        ..Default::default()
    };
    let server = RegistryServer::start(Env::get(), options).await.unwrap();
    takes(server.registry(), &image()).await;
    let answer = reqwest::get(format!("{}/v2/", server.registry().url())).await.unwrap();
    assert_eq!(answer.headers()["X-Test"], "yes");
}

#[tokio::test]
async fn a_deleted_tag_is_gone() {
    let (client, repository, image) = (client(&Env::get().target), repository("delete"), image());
    client.push(&repository, "one", &image).await.unwrap();
    client.push(&repository, "two", &image).await.unwrap();
    client.delete(&repository, "one").await.unwrap();
    assert_eq!(client.digest_of(&repository, "one").await.unwrap(), None);
    assert!(client.holds(&repository, "two", &image).await.unwrap());
}

#[tokio::test]
async fn the_source_refuses_a_wrong_password() {
    let error = client(&Env::get().source.with_credentials("puller", "wrong")).tags("any").await.unwrap_err();
    assert!(error.to_string().contains("401"), "{error}");
}

#[tokio::test]
async fn the_token_server_grants_what_the_user_may() {
    let env = Env::get();
    let (repository, image) = (repository("grants"), image());
    client(&env.target).push(&repository, "latest", &image).await.unwrap();
    let user = |name: &str| {
        let user = env.token.user(name).unwrap();
        client(&env.target.with_credentials(&user.name, &user.password))
    };
    assert!(user("pull").holds(&repository, "latest", &image).await.unwrap());
    let refused = user("pull").push(&repository, "other", &crate::image()).await.unwrap_err();
    assert!(refused.to_string().contains("401"), "{refused}");
    let refused = user("nobody").tags(&repository).await.unwrap_err();
    assert!(refused.to_string().contains("401"), "{refused}");
    let wrong = client(&env.target.with_credentials("push", "wrong")).tags(&repository).await.unwrap_err();
    assert!(wrong.to_string().contains("/token") && wrong.to_string().contains("401"), "{wrong}");
}

#[tokio::test]
async fn a_token_server_of_ones_own_counts_its_requests() {
    let env = Env::get();
    let options = TokenOptions { expires_in: 60, ..Default::default() };
    let tokens = TokenServer::start(&env.ca().unwrap(), &env.log("own-token"), options).await.unwrap();
    let options = RegistryOptions { auth: tokens.endpoint().auth(), ..Default::default() };
    let server = RegistryServer::start(env, options).await.unwrap();
    let user = tokens.endpoint().user("push").unwrap();
    let registry = server.registry().with_credentials(&user.name, &user.password);
    client(&registry).tags("some/repository").await.unwrap();
    let requests = tokens.endpoint().requests().unwrap();
    assert_eq!(requests.len(), 1);
    assert_eq!(requests[0].scopes, ["repository:some/repository:pull"]);
    assert_eq!((requests[0].user.as_deref(), requests[0].status), (Some("push"), 200));
}

#[tokio::test]
async fn requests_are_counted_in_the_access_log() {
    let users = vec![("me".to_owned(), "secret".to_owned())];
    let options = RegistryOptions { auth: Auth::Htpasswd(users), ..Default::default() };
    let server = RegistryServer::start(Env::get(), options).await.unwrap();
    client(server.registry()).tags("some/repository").await.unwrap();
    let log = server.registry().access_log().unwrap();
    let statuses: Vec<u16> = log
        .iter()
        .filter(|access| access.path == "/v2/some/repository/tags/list")
        .map(|access| access.status)
        .collect();
    assert_eq!(statuses, [401, 404]);
}
