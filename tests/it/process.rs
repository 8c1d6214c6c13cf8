//! What the operator's process is given, and is not: it goes on with what there is, and nothing is lost.

use std::process::Command;

use anyhow::{Result, ensure};
use futures::future::try_join_all;
use serde_json::json;
use testenv::{
    images::Image,
    proxy::{Action, Matcher, Proxy, Route},
};

use crate::support::{Place, eventually};

const MIRRORS: u64 = 4;
const TAGS: u64 = 6;

/// P5: most of what it opens are connections, of which it is allowed more than it can have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_with_64_descriptors_copies_everything_and_goes_on() -> Result<()> {
    let place = Place::new("descriptors").await?;
    let source = Proxy::to(place.env, &place.env.source).label("source").start().await?;
    let target = Proxy::to(place.env, &place.env.target).label("target").start().await?;
    place.pull_secret("pull", &[source.registry()]).await?;
    place.pull_secret("push", &[target.registry()]).await?;
    // Long enough for many to be under way together.
    let blobs = Matcher::new().method("GET").route(Route::Blob);
    source.rule(blobs, Action::DelayAnswer(std::time::Duration::from_millis(100)));
    let tags: Vec<String> = (0..TAGS).map(|tag| tag.to_string()).collect();
    let tags: Vec<&str> = tags.iter().map(String::as_str).collect();
    let image = |mirror: u64, tag: u64| Image::single(mirror * 100 + tag, &[3000, 3000, 3000, 3000]);
    let name = |mirror: u64| format!("m{mirror}");
    for mirror in 0..MIRRORS {
        let (place, name) = (&place, name(mirror));
        let pushes = (0..TAGS).zip(&tags).map(|(number, tag)| {
            let (image, name) = (image(mirror, number), name.clone());
            async move { place.push(&place.env.source, &name, tag, &image).await }
        });
        try_join_all(pushes).await?;
    }
    let host = |proxy: &Proxy| json!({"host": proxy.host(), "limits": {"requests": 200, "streams": 50}});
    let config = json!({
        "networks": {"allow": ["127.0.0.0/8", "::1"]}, "registries": [host(&source), host(&target)],
    });
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -n 64; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_imagemirror")]);
    let mut operator = place.start(limited, &place.settings(config, &json!({}))?, &["--log-level", "debug"])?;
    for mirror in 0..MIRRORS {
        let name = name(mirror);
        place.apply(&name, &place.spec(source.registry(), target.registry(), &[(&name, &tags)])).await?;
    }
    for mirror in 0..MIRRORS {
        place.until_ready(&name(mirror)).await?;
        for (number, tag) in (0..TAGS).zip(&tags) {
            let held = place.holds(&place.env.target, &name(mirror), tag, &image(mirror, number)).await?;
            ensure!(held, "{}:{tag} is not whole", name(mirror));
        }
    }
    let log = operator.logged()?;
    ensure!(log.contains("Too many open files"), "64 were enough: this test shows nothing");
    ensure!(operator.process.is_running()? && !log.contains("panicked"), "it did not live through it");
    source.clear();
    place.request("m0").await?;
    // The server of probes is out of descriptors, too, for as long as the copies are.
    eventually("an answer of the probes", || async { Ok(operator.get("/livez").await?.0 == 200) }).await
}
