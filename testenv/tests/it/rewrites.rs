//! What a rule changes in the words of requests and answers: headers, queries, statuses, bodies and lengths.

use std::time::{Duration, Instant};

use http::StatusCode;
use testenv::proxy::{Action, Matcher, Proxy, Route};
use testenv::{Env, Image};

use crate::{DEADLINE, blob_gets, client, raw, repository};

/// A blob at the open registry, and a proxy in front of it.
async fn blob(test: &str) -> (Proxy, String, testenv::Content) {
    let env = Env::get();
    let (repository, image) = (repository(test), Image::single(fastrand::u64(..), &[40_000]));
    client(&env.open).push(&repository, "latest", &image).await.unwrap();
    let proxy = Proxy::to(env, &env.open).start().await.unwrap();
    (proxy, repository, image.blobs[1].clone())
}

fn starts() -> Matcher {
    Matcher::new().method("POST").route(Route::UploadStart)
}

fn puts() -> Matcher {
    Matcher::new().method("PUT").route(Route::Upload)
}

#[tokio::test]
async fn a_body_becomes_another_shorter_or_longer_with_its_length() {
    let (proxy, repository, blob) = blob("bodies").await;
    let url = format!("{}/v2/{repository}/blobs/{}", proxy.url(), blob.digest);
    let whole = blob.bytes.to_vec();
    for (action, expected) in [
        (Action::replace_body("other"), b"other".to_vec()),
        (Action::append_body("more"), [whole.as_slice(), b"more"].concat()),
        (Action::TruncateBody { after: 1000 }, whole[..1000].to_vec()),
        (Action::TruncateBody { after: 100_000 }, whole.clone()),
    ] {
        proxy.clear();
        proxy.rule(Matcher::new().route(Route::Blob), action.clone());
        let answer = raw().get(&url).send().await.unwrap();
        assert_eq!(answer.headers()["Content-Length"], expected.len().to_string(), "{action:?}");
        assert!(answer.bytes().await.unwrap() == expected, "{action:?}");
        assert_eq!(proxy.requests().last().unwrap().response_bytes, expected.len() as u64);
        let head = raw().head(&url).send().await.unwrap();
        assert_eq!(head.headers()["Content-Length"], expected.len().to_string(), "{action:?}");
    }
    assert_eq!(client(proxy.registry()).tags(&repository).await.unwrap(), ["latest"]);
}

#[tokio::test]
async fn lines_are_left_out_and_all_connections_cut() {
    let (proxy, repository, blob) = blob("lines").await;
    let url = format!("{}/v2/{repository}/blobs/{}", proxy.url(), blob.digest);
    proxy.rule(blob_gets().times(1), [Action::replace_body("a1\nb2\na3\nrest"), Action::DropLines("a".to_owned())]);
    assert_eq!(raw().get(&url).send().await.unwrap().text().await.unwrap(), "b2\nrest");
    proxy.rule(blob_gets().times(1), Action::StallResponseBody { after: 10 });
    let stalled = raw().get(&url).send().await.unwrap();
    proxy.cut();
    assert!(stalled.bytes().await.is_err());
    assert_eq!(raw().get(&url).send().await.unwrap().bytes().await.unwrap(), blob.bytes);
}

#[tokio::test]
async fn a_range_can_be_ignored_and_a_status_can_be_another() {
    let (proxy, repository, blob) = blob("range").await;
    let url = format!("{}/v2/{repository}/blobs/{}", proxy.url(), blob.digest);
    let get = async || {
        let answer = raw().get(&url).header("Range", "bytes=39990-").send().await.unwrap();
        (answer.status().as_u16(), answer.bytes().await.unwrap().len())
    };
    assert_eq!(get().await, (206, 10));
    proxy.rule(blob_gets(), Action::RemoveRequestHeader("range".to_owned()));
    assert_eq!(get().await, (200, 40_000));
    assert_eq!(proxy.requests()[1].range.as_deref(), Some("bytes=39990-"));
    proxy.clear();
    proxy.rule(blob_gets(), Action::SetStatus(200));
    assert_eq!(get().await, (200, 10));
    assert_eq!(proxy.requests()[2].status, Some(200));
    proxy.clear();
    proxy.rule(blob_gets(), Action::set_request_header("Range", "bytes=0-4"));
    assert_eq!(get().await, (206, 5));
}

#[tokio::test]
async fn a_mount_can_become_an_upload_session() {
    let (proxy, repository, blob) = blob("mount").await;
    let other = crate::repository("mounted");
    let url = format!("{}/v2/{other}/blobs/uploads/?mount={}&from={repository}", proxy.url(), blob.digest);
    proxy.rule(starts().times(1), Action::RemoveQuery("mount".to_owned()));
    assert_eq!(raw().post(&url).send().await.unwrap().status(), StatusCode::ACCEPTED);
    assert_eq!(proxy.requests()[0].key.reference.as_deref(), Some(blob.digest.as_str()));
    assert_eq!(raw().post(&url).send().await.unwrap().status(), StatusCode::CREATED);
}

#[tokio::test]
async fn a_location_can_lead_through_another_proxy() {
    let (proxy, repository, _) = blob("location").await;
    let second = Proxy::to(Env::get(), &Env::get().open).start().await.unwrap();
    proxy.rule(starts(), Action::MoveLocation(second.url()));
    let blob = &Image::single(fastrand::u64(..), &[3000]).blobs[1];
    client(proxy.registry()).put_blob(&repository, blob).await.unwrap();
    assert_eq!((proxy.count(&puts()), second.count(&puts())), (0, 1));
    assert_eq!(second.requests()[0].request_bytes, 3000);

    // The same for a download, as registries send clients to their storage.
    let location = format!("{}/v2/{repository}/blobs/{}?signature=1", second.url(), blob.digest);
    proxy.rule(blob_gets(), Action::respond(307).header("Location", &location));
    let bytes = raw().get(format!("{}/v2/{repository}/blobs/{}", proxy.url(), blob.digest)).send().await.unwrap();
    assert!(bytes.bytes().await.unwrap() == blob.bytes);
    assert_eq!(second.count(&blob_gets()), 1);
}

#[tokio::test]
async fn a_byte_flipped_on_the_way_in_is_refused_by_the_registry() {
    let (proxy, repository, _) = blob("flipped").await;
    proxy.rule(puts().times(1), Action::FlipRequestByte { at: 17 });
    let blob = &Image::single(fastrand::u64(..), &[3000]).blobs[1];
    let error = client(proxy.registry()).put_blob(&repository, blob).await.unwrap_err().to_string();
    assert!(error.contains("DIGEST_INVALID"), "{error}");
    client(proxy.registry()).put_blob(&repository, blob).await.unwrap();
}

#[tokio::test]
async fn an_upload_can_stand_still_at_a_byte() {
    let (proxy, repository, _) = blob("still").await;
    proxy.rule(puts(), Action::StallRequestBody { after: 1000 });
    let upload = tokio::spawn({
        let client = client(proxy.registry());
        async move { client.put_blob(&repository, &Image::single(fastrand::u64(..), &[3_000_000]).blobs[1]).await }
    });
    proxy.wait_for(|log| log.iter().any(|exchange| exchange.request_bytes == 1000), DEADLINE).await.unwrap();
    assert!(!upload.is_finished());
    // Here a test kills the client.
    upload.abort();
    proxy.stop().await;
}

#[tokio::test]
async fn a_body_can_be_taken_in_full_and_thrown_away() {
    let (proxy, repository, _) = blob("discard").await;
    proxy.rule(puts(), [Action::DiscardRequestBody, Action::respond(500).body("no room")]);
    let blob = &Image::single(fastrand::u64(..), &[3_000_000]).blobs[1];
    let error = client(proxy.registry()).put_blob(&repository, blob).await.unwrap_err().to_string();
    assert!(error.contains("no room"), "{error}");
    assert_eq!(proxy.requests().last().unwrap().request_bytes, 3_000_000);
}

#[tokio::test]
async fn one_exchange_can_be_slow_and_late() {
    let (proxy, repository, blob) = blob("slow").await;
    proxy.rule(
        blob_gets(),
        [Action::DelayAnswer(Duration::from_millis(100)), Action::Throttle { bytes_per_second: 200_000 }],
    );
    let started = Instant::now();
    assert!(client(proxy.registry()).blob(&repository, &blob.digest).await.unwrap().unwrap() == blob.bytes);
    assert!(started.elapsed() >= Duration::from_millis(290), "{:?}", started.elapsed());
}

#[tokio::test]
async fn an_index_may_list_a_blob_without_being_a_violation() {
    let (proxy, repository, blob) = blob("listed").await;
    let entries = serde_json::json!({ "schemaVersion": 2, "manifests": [blob.descriptor()] });
    let index = testenv::Content::new(testenv::images::OCI_INDEX, entries.to_string());
    // Whatever the registry says to that.
    let _ = client(proxy.registry()).put_manifest(&repository, "listed", &index).await;
    assert_eq!(proxy.violations(), Vec::<String>::new());
}
