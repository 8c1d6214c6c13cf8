//! The proxy passes everything on unchanged, except what a rule says, and sees a manifest without its children.

use std::time::{Duration, Instant};

use testenv::proxy::{Action, Close, Gate, Matcher, Proxy, Route};
use testenv::{Env, Image};

use crate::{DEADLINE, blob_gets, client, image, is_done, raw, repository, source_with_image};

#[tokio::test]
async fn an_image_goes_through_unchanged_both_ways() {
    let env = Env::get();
    for registry in [&env.target, &env.open] {
        let proxy = Proxy::to(env, registry).label("target").start().await.unwrap();
        let (client, repository, image) = (client(proxy.registry()), repository("through"), image());
        client.push(&repository, "latest", &image).await.unwrap();
        assert!(client.holds(&repository, "latest", &image).await.unwrap());
        assert_eq!(proxy.violations(), Vec::<String>::new());

        let uploads = Matcher::new().method("PUT").route(Route::Upload);
        let put: u64 =
            proxy.requests().iter().filter(|e| uploads.matches(&e.key, &e.path)).map(|e| e.request_bytes).sum();
        let blobs: usize = image.blobs.iter().map(|blob| blob.bytes.len()).sum();
        assert!(put >= blobs as u64, "{put} of {blobs}");
        assert_eq!(proxy.count(&uploads.clone().reference(&image.blobs[0].digest)), 1);
    }
}

#[tokio::test]
async fn tls_may_be_on_one_side_alone() {
    let env = Env::get();
    let proxy = Proxy::to(env, &env.source).plain().start().await.unwrap();
    assert!(proxy.url().starts_with("http://"));
    let (client, repository, image) = (client(proxy.registry()), repository("plain"), image());
    client.push(&repository, "latest", &image).await.unwrap();
    assert!(client.holds(&repository, "latest", &image).await.unwrap());
}

#[tokio::test]
async fn a_manifest_before_its_children_is_a_violation() {
    let env = Env::get();
    let proxy = Proxy::to(env, &env.target).start().await.unwrap();
    let (client, repository, image) = (client(proxy.registry()), repository("orphan"), image());
    assert!(client.put_manifest(&repository, "latest", &image.root).await.is_err());
    let violations = proxy.violations();
    assert!(violations.iter().any(|line| line.contains(&image.manifests[0].digest)), "{violations:?}");
}

#[tokio::test]
async fn a_rule_answers_the_nth_request_alone() {
    let (proxy, repository, image) = source_with_image().await;
    let client = client(proxy.registry());
    let digest = &image.blobs[0].digest;
    // The first request of the client for this blob is without credentials, so the second is its first real one.
    proxy.rule(blob_gets().reference(digest).nth(2), Action::respond(503).header("Retry-After", "1").body("later"));
    let error = client.blob(&repository, digest).await.unwrap_err().to_string();
    assert!(error.contains("503") && error.contains("later"), "{error}");
    assert_eq!(client.blob(&repository, digest).await.unwrap().unwrap(), image.blobs[0].bytes);
    let keys: Vec<String> = proxy.requests().iter().map(|exchange| exchange.key.to_string()).collect();
    assert_eq!(keys[1], format!("source GET Blob {repository} {digest} #2"));
}

#[tokio::test]
async fn a_cut_answer_ends_at_the_byte_with_fin_and_with_reset() {
    let (proxy, repository, image) = source_with_image().await;
    let digest = &image.blobs.iter().max_by_key(|blob| blob.bytes.len()).unwrap().digest;
    for (nth, close) in [(2, Close::Fin), (4, Close::Reset)] {
        proxy.forget();
        let cut = Action::CutResponseBody { after: 40_000, close };
        proxy.rule(blob_gets().reference(digest).nth(nth), cut);
        let http = raw();
        let url = format!("{}/v2/{repository}/blobs/{digest}", proxy.url());
        let _challenge = http.get(&url).send().await.unwrap();
        let mut answer = http.get(&url).basic_auth("puller", proxy.registry().password.as_ref()).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        let (read, error) = loop_until_error(&mut answer).await;
        // What a reset overtakes in the reader's buffers is lost; an end of file overtakes nothing.
        assert!(if close == Close::Fin { read == 40_000 } else { read <= 40_000 }, "{close:?}: {read}");
        assert_eq!(error.contains("reset"), close == Close::Reset, "{close:?}: {error}");
        proxy.wait_for(|log| log.iter().all(|exchange| exchange.done), DEADLINE).await.unwrap();
        assert_eq!(proxy.requests().last().unwrap().response_bytes, 40_000);
    }
}

/// How many bytes came, and the error that ended it with its causes.
async fn loop_until_error(answer: &mut reqwest::Response) -> (usize, String) {
    let mut read = 0;
    loop {
        match answer.chunk().await {
            Ok(Some(chunk)) => read += chunk.len(),
            Ok(None) => return (read, "no error".to_owned()),
            Err(error) => return (read, format!("{:#}", anyhow::Error::from(error))),
        }
    }
}

#[tokio::test]
async fn a_cut_request_never_becomes_a_blob() {
    let env = Env::get();
    let proxy = Proxy::to(env, &env.open).start().await.unwrap();
    let (client, repository, image) = (client(proxy.registry()), repository("cut"), image());
    let blob = image.blobs.iter().max_by_key(|blob| blob.bytes.len()).unwrap();
    proxy.rule(
        Matcher::new().method("PUT").route(Route::Upload).times(1),
        Action::CutRequestBody { after: 10_000, close: Close::Fin },
    );
    assert!(client.put_blob(&repository, blob).await.is_err());
    proxy.wait_for(|log| is_done(log, "PUT", Route::Upload), DEADLINE).await.unwrap();
    assert_eq!(proxy.requests().last().unwrap().request_bytes, 10_000);
    assert_eq!(client.blob(&repository, &blob.digest).await.unwrap(), None);
    client.put_blob(&repository, blob).await.unwrap();
}

#[tokio::test]
async fn an_answer_can_be_lost_after_the_work_is_done() {
    let env = Env::get();
    let proxy = Proxy::to(env, &env.open).start().await.unwrap();
    let (client, repository, image) = (client(proxy.registry()), repository("lost"), Image::single(7, &[100]));
    proxy.rule(Matcher::new().method("PUT").route(Route::Manifest), Action::CloseAfterAnswer(Close::Reset));
    assert!(client.push(&repository, "latest", &image).await.is_err());
    assert!(client.holds(&repository, "latest", &image).await.unwrap());
}

#[tokio::test]
async fn a_connection_can_be_closed_before_the_work_is_done() {
    let env = Env::get();
    let proxy = Proxy::to(env, &env.open).start().await.unwrap();
    let (client, repository) = (client(proxy.registry()), repository("closed"));
    proxy.rule(Matcher::new().method("PUT").route(Route::Manifest), Action::CloseBefore(Close::Fin));
    assert!(client.push(&repository, "latest", &Image::single(7, &[100])).await.is_err());
    assert_eq!(client.digest_of(&repository, "latest").await.unwrap(), None);
}

#[tokio::test]
async fn a_gate_holds_a_request_until_it_is_opened() {
    let (proxy, repository, image) = source_with_image().await;
    let gate = Gate::new();
    proxy.rule(Matcher::new().route(Route::Manifest), Action::Gate(gate.clone()));
    let task = tokio::spawn({
        let (client, repository) = (client(proxy.registry()), repository.clone());
        async move { client.digest_of(&repository, "latest").await.unwrap() }
    });
    gate.arrived(1).await.unwrap();
    assert!(!task.is_finished());
    assert_eq!(proxy.requests()[0].status, None);
    gate.open();
    assert_eq!(task.await.unwrap().as_deref(), Some(image.digest()));
}

#[tokio::test]
async fn bytes_can_be_flipped_and_headers_changed() {
    let (proxy, repository, image) = source_with_image().await;
    proxy.rule(blob_gets(), [Action::FlipByte { at: 20 }, Action::set_header("Docker-Content-Digest", "sha256:0")]);
    let blob = client(proxy.registry()).blob(&repository, &image.blobs[0].digest).await.unwrap().unwrap();
    let differ: Vec<usize> = (0..blob.len()).filter(|i| blob[*i] != image.blobs[0].bytes[*i]).collect();
    assert_eq!(differ, [20]);
}

#[tokio::test]
async fn the_proxy_limits_each_direction() {
    let env = Env::get();
    let image = Image::single(fastrand::u64(..), &[500_000]);
    let repository = repository("limit");
    let proxy = Proxy::to(env, &env.open).bytes_per_second_down(1_000_000).start().await.unwrap();
    let client = client(proxy.registry());
    let started = Instant::now();
    client.push(&repository, "latest", &image).await.unwrap();
    assert!(started.elapsed() < Duration::from_millis(400), "up: {:?}", started.elapsed());
    let started = Instant::now();
    assert!(client.holds(&repository, "latest", &image).await.unwrap());
    assert!(started.elapsed() > Duration::from_millis(490), "down: {:?}", started.elapsed());
}

#[tokio::test]
async fn the_api_server_answers_through_a_proxy() {
    let env = Env::get();
    let proxy = Proxy::to_apiserver(env).start().await.unwrap();
    let version = raw().get(format!("{}/version", proxy.url())).send().await.unwrap();
    assert_eq!(version.status(), 200);
    assert_eq!(proxy.count(&Matcher::new().path_contains("/version").route(Route::Other)), 1);
}

#[tokio::test]
async fn waiting_in_vain_says_what_was_seen() {
    let (proxy, repository, _) = source_with_image().await;
    client(proxy.registry()).tags(&repository).await.unwrap();
    let error = proxy.wait_for(|log| log.len() > 9, Duration::from_millis(10)).await.unwrap_err().to_string();
    assert!(error.contains("source GET Tags"), "{error}");
}

#[tokio::test]
async fn an_upstream_that_is_gone_is_a_bad_gateway() {
    let env = Env::get();
    let nobody = env.open.at("127.0.0.1:1");
    let proxy = Proxy::to(env, &nobody).start().await.unwrap();
    let error = client(proxy.registry()).tags("any").await.unwrap_err().to_string();
    assert!(error.contains("502") && error.contains("connect to the upstream"), "{error}");
}
