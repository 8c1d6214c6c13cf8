//! The independent judges find an image whole, or say what is wrong with it.

use testenv::proxy::{Action, Proxy};
use testenv::witness::{crane_validate, regctl_reads};
use testenv::{Env, Image};

use crate::{blob_gets, client, image, repository};

#[tokio::test]
async fn an_image_is_found_whole_wherever_it_is() {
    let env = Env::get();
    let image = Image::archives(fastrand::u64(..), &[300, 70_000], &["linux/amd64", "linux/arm/v7"]).unwrap();
    for registry in [&env.source, &env.target, &env.open] {
        let (client, repository) = (client(registry), repository("witness"));
        client.push(&repository, "latest", &image).await.unwrap();
        crane_validate(env, registry, &repository, "latest", true).await.unwrap();
        crane_validate(env, registry, &repository, image.digest(), true).await.unwrap();
        for reference in ["latest", image.digest()] {
            regctl_reads(env, registry, &repository, reference).await.unwrap();
        }
    }
}

#[tokio::test]
async fn crane_looks_whether_layers_of_any_content_are_there() {
    let env = Env::get();
    let (repository, image) = (repository("witness"), image());
    client(&env.open).push(&repository, "latest", &image).await.unwrap();
    crane_validate(env, &env.open, &repository, "latest", false).await.unwrap();
}

#[tokio::test]
async fn it_is_said_what_is_wrong() {
    let env = Env::get();
    let repository = repository("witness");
    let image = Image::archives(fastrand::u64(..), &[3000], &["linux/amd64"]).unwrap();
    client(&env.open).push(&repository, "latest", &image).await.unwrap();
    let absent = crane_validate(env, &env.open, &repository, "other", true).await.unwrap_err().to_string();
    assert!(absent.contains("MANIFEST_UNKNOWN"), "{absent}");
    let absent = regctl_reads(env, &env.open, &repository, "other").await.unwrap_err().to_string();
    assert!(absent.contains("not found"), "{absent}");
    let proxy = Proxy::to(env, &env.open).start().await.unwrap();
    proxy.rule(blob_gets(), Action::FlipByte { at: 2000 });
    let broken = crane_validate(env, proxy.registry(), &repository, "latest", true).await.unwrap_err().to_string();
    assert!(broken.contains("invalid checksum"), "{broken}");
    let broken = regctl_reads(env, proxy.registry(), &repository, "latest").await.unwrap_err().to_string();
    assert!(broken.contains("digest mismatch"), "{broken}");
}
