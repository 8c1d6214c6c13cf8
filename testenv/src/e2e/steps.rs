//! The steps, in their order: what a user does with the chart, and what happens to the pods meanwhile.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::cluster::{APPS, Asked, Cluster, SYSTEM, text};
use crate::certs::http_client;
use crate::client::Client;
use crate::terminal::{megabytes, output, short};

const MIRROR: &str = "imagemirror.imagemirror.dev/app";
const SAYS: &str = "the-mirrored-image-runs";
/// Of a time in RFC 3339, the length to the second.
const SECOND: usize = "2006-01-02T15:04:05".len();
/// The operator promises to end within 25 s.
const END_DEADLINE: Duration = Duration::from_secs(25);

pub(super) async fn all(cluster: &Cluster, image: &Path) -> Result<()> {
    push_the_operator(cluster, image).await?;
    let notes = install(cluster).await?;
    run_the_notes(cluster, &notes).await?;
    mirror_while_the_leader_goes(cluster).await?;
    read_the_metrics(cluster).await?;
    run_what_was_mirrored(cluster).await?;
    test_and_upgrade(cluster).await?;
    uninstall(cluster).await
}

async fn push_the_operator(cluster: &Cluster, image: &Path) -> Result<()> {
    cluster.step("The operator's image goes to a registry with a password");
    let name = format!("{}/imagemirror:{}", cluster.images.host, env!("CARGO_PKG_VERSION"));
    let pushed = cluster.run(&format!("crane push {} {name}", image.display())).await?;
    output(&pushed);
    Ok(())
}

/// Gives what helm prints.
async fn install(cluster: &Cluster) -> Result<String> {
    cluster.step("Helm installs two replicas into a namespace of restricted pods, and waits for them");
    cluster.run(&format!("kubectl create namespace {SYSTEM}")).await?;
    cluster.run(&format!("kubectl label namespace {SYSTEM} pod-security.kubernetes.io/enforce=restricted")).await?;
    cluster.pull_secret(SYSTEM, "operator-pull", &cluster.images).await?;
    let repository = format!("{}/imagemirror", cluster.images.host);
    let said = cluster
        .run(&format!(
            "helm install imagemirror charts/imagemirror --namespace {SYSTEM} --wait --timeout 2m \
             --set replicaCount=2 --set image.repository={repository} --set imagePullSecrets[0].name=operator-pull"
        ))
        .await?;
    let pods = cluster.operators().await?;
    ensure!(pods.len() == 2, "instead of two pods there are {pods:?}");
    output(&format!("Ready: {}", &pods.join(" ")));
    Ok(said)
}

async fn run_the_notes(cluster: &Cluster, notes: &str) -> Result<()> {
    cluster.step("The commands of NOTES.txt work");
    let (_, notes) = notes.split_once("NOTES:").context("helm printed no notes")?;
    let commands: Vec<&str> = notes.lines().map(str::trim).filter(|line| line.starts_with("kubectl ")).collect();
    ensure!(!commands.is_empty(), "no command in the notes:\n{notes}");
    for command in commands {
        cluster.commands.show_all(command, 0).await?;
    }
    Ok(())
}

async fn mirror_while_the_leader_goes(cluster: &Cluster) -> Result<()> {
    cluster.step("An ImageMirror with pull secrets; the leader's pod is deleted in mid-copy");
    cluster.run(&format!("kubectl create namespace {APPS}")).await?;
    cluster.pull_secret(APPS, "source-pull", &cluster.source).await?;
    cluster.pull_secret(APPS, "target-push", &cluster.target).await?;
    cluster.run(&format!("kubectl -n {APPS} create secret generic registry-ca --from-file=ca.crt")).await?;
    cluster.apply(&mirror(cluster)).await?;

    let copying = async || {
        let status = &check(cluster).await?["status"];
        let done = status["progress"]["bytesDone"].as_u64().unwrap_or_default();
        Ok(Asked::when(done > 0, done, status))
    };
    let done = cluster.until("the copy has begun", 60, copying).await?;
    output(&format!("{} of {} MB are copied", megabytes(done), megabytes(cluster.image.size() as u64)));
    let leader = text(&lease(cluster).await?["holderIdentity"]);
    let deleted = Instant::now();
    cluster.run(&format!("kubectl -n {SYSTEM} delete pod {leader} --wait=false")).await?;
    let replaced = async || {
        check(cluster).await?;
        let lease = lease(cluster).await?;
        let now = text(&lease["holderIdentity"]);
        Ok(Asked::when(!now.is_empty() && now != leader, lease.clone(), &lease))
    };
    let lease = cluster.until("another pod leads", 40, replaced).await?;
    output(&format!("{} leads after {} ms", text(&lease["holderIdentity"]), deleted.elapsed().as_millis()));
    cluster.run(&format!("kubectl -n {SYSTEM} wait --for=delete pod/{leader} --timeout=60s")).await?;
    ensure!(deleted.elapsed() < END_DEADLINE, "{leader} took {} s to end", deleted.elapsed().as_secs());
    output(&format!("{leader} is gone after {} ms", deleted.elapsed().as_millis()));

    let ready = async || {
        let mirror = check(cluster).await?;
        Ok(Asked::when(is_ready(&mirror), mirror["status"]["lastSync"].clone(), &mirror["status"]))
    };
    let run = cluster.until("the object is Ready", 90, ready).await?;
    let (started, acquired) = (text(&run["startedAt"]), text(&lease["acquireTime"]));
    // To the second: the one is written with fractions.
    let is_later = started.get(..SECOND) >= acquired.get(..SECOND) && run["bytesCopied"].as_u64() > Some(0);
    ensure!(is_later, "not copied by the new leader, which leads since {acquired}: {run}");
    let (found, wanted) = (at_target(cluster).await?, cluster.image.digest());
    ensure!(found.as_deref() == Some(wanted), "the target's tag is {found:?}, not {wanted}");
    let violations = cluster.proxy.violations();
    ensure!(violations.is_empty(), "manifests came before their children: {violations:?}");
    output(&format!("the target's tag is {}", short(wanted)));
    Ok(())
}

async fn read_the_metrics(cluster: &Cluster) -> Result<()> {
    cluster.step("The metrics are read through the Service");
    let service = cluster.get(SYSTEM, "service imagemirror-metrics").await?;
    let address = text(&service["spec"]["clusterIP"]);
    let (client, url) = (http_client(&cluster.env.ca_pem, None)?, format!("http://{address}:8080/metrics"));
    // Behind it are the leader and the standby, in turns.
    let scraped = async || {
        let metrics = client.get(&url).send().await?.error_for_status()?.text().await?;
        let synced = metrics.lines().find(|line| {
            line.starts_with("imagemirror_images{") && line.contains("state=\"synced\"") && line.ends_with(" 1")
        });
        Ok(Asked::when(synced.is_some(), synced.map(str::to_owned), &"a standby's"))
    };
    let line = cluster.until("the leader's metrics show the image", 30, scraped).await?;
    output(&line.unwrap_or_default());
    Ok(())
}

async fn run_what_was_mirrored(cluster: &Cluster) -> Result<()> {
    cluster.step("A pod runs the mirrored image with the target's pull secret, and one without it does not");
    cluster.pull_secret(APPS, "target-pull", &cluster.target_pull).await?;
    cluster.apply(&pod(cluster, "with-secret", &json!([{"name": "target-pull"}]))).await?;
    cluster.apply(&pod(cluster, "without-secret", &json!([]))).await?;

    let succeeded = async || {
        let pod = cluster.get(APPS, "pod with-secret").await?;
        Ok(Asked::when(pod["status"]["phase"] == "Succeeded", pod.clone(), &pod["status"]))
    };
    let ended = cluster.until("the pod has run to its end", 60, succeeded).await?;
    let (id, wanted) = (text(&ended["status"]["containerStatuses"][0]["imageID"]), cluster.image.digest());
    ensure!(id.ends_with(&format!("@{wanted}")), "the pod ran {id}, not {wanted}");
    let log = cluster.run(&format!("kubectl -n {APPS} logs with-secret")).await?;
    ensure!(log == SAYS, "the pod printed {log:?}");
    output(&log);

    let refused = async || {
        let pod = cluster.get(APPS, "pod without-secret").await?;
        let reason = text(&pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"]);
        let is_refused = ["ErrImagePull", "ImagePullBackOff"].contains(&reason.as_str());
        Ok(Asked::when(is_refused, reason, &pod["status"]))
    };
    let reason = cluster.until("the pod without the secret is refused", 60, refused).await?;
    output(&format!("without-secret: {reason}"));
    Ok(())
}

async fn test_and_upgrade(cluster: &Cluster) -> Result<()> {
    cluster.step("`helm test` passes; `helm upgrade` makes new pods, which work");
    cluster.run(&format!("helm test imagemirror --namespace {SYSTEM} --timeout 1m")).await?;
    no_restarts(cluster).await?;
    let before = cluster.operators().await?;
    cluster
        .run(&format!(
            "helm upgrade imagemirror charts/imagemirror --namespace {SYSTEM} --wait --timeout 2m --reuse-values \
             --set config.limits.runs=2"
        ))
        .await?;
    let renewed = async || {
        let now = cluster.operators().await?;
        let is_new = now.len() == 2 && now.iter().all(|pod| !before.contains(pod));
        Ok(Asked::when(is_new, (), &now.join(" ")))
    };
    cluster.until("both pods are new", 60, renewed).await?;
    cluster.run(&format!("kubectl -n {APPS} annotate {MIRROR} imagemirror.dev/requestedAt=upgraded")).await?;
    let handled = async || {
        let mirror = check(cluster).await?;
        let is_handled = mirror["status"]["lastHandledReconcileAt"] == "upgraded" && is_ready(&mirror);
        Ok(Asked::when(is_handled, (), &mirror["status"]))
    };
    cluster.until("the new leader has synced", 60, handled).await?;
    no_restarts(cluster).await
}

async fn uninstall(cluster: &Cluster) -> Result<()> {
    cluster.step("`helm uninstall` leaves the CRD and the ImageMirror");
    cluster.run(&format!("helm uninstall imagemirror --namespace {SYSTEM} --wait --timeout 1m")).await?;
    let gone = async || {
        let pods = cluster.operators().await?;
        Ok(Asked::when(pods.is_empty(), (), &pods.join(" ")))
    };
    cluster.until("the operator's pods are gone", 60, gone).await?;
    let mirror = check(cluster).await?;
    ensure!(is_ready(&mirror), "the object is no longer Ready: {}", mirror["status"]);
    output(&cluster.run(&format!("kubectl get imagemirrors.imagemirror.dev -n {APPS}")).await?);
    Ok(())
}

fn mirror(cluster: &Cluster) -> Value {
    let (source, target) = (&cluster.source.host, &cluster.target.host);
    let certificate = json!({"name": "registry-ca"});
    json!({
        "apiVersion": "imagemirror.dev/v1alpha1",
        "kind": "ImageMirror",
        "metadata": {"name": "app", "namespace": APPS},
        "spec": {
            "imagePullSecrets": [{"name": "source-pull"}],
            "target": {"registry": target, "repository": "mirror/{name}", "secretRef": {"name": "target-push"}},
            "registries": [
                {"host": source, "certSecretRef": certificate},
                {"host": target, "certSecretRef": certificate},
            ],
            "images": [{"source": format!("{source}/vendor/app"), "tags": ["1.0"]}],
        },
    })
}

/// A pod of the mirrored image, which must be pulled.
fn pod(cluster: &Cluster, name: &str, secrets: &Value) -> Value {
    let image = format!("{}/mirror/app:1.0", cluster.target.host);
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": APPS, "labels": {"app": "mirrored"}},
        "spec": {
            "restartPolicy": "Never",
            "imagePullSecrets": secrets,
            "containers": [{"name": "app", "image": image, "imagePullPolicy": "Always", "args": [SAYS]}],
        },
    })
}

/// The ImageMirror as it is, once the target's tag has been seen to be right or not there.
async fn check(cluster: &Cluster) -> Result<Value> {
    if let Some(digest) = at_target(cluster).await? {
        ensure!(digest == cluster.image.digest(), "the target's tag is {digest}, which was never at the source");
    }
    cluster.get(APPS, MIRROR).await
}

async fn at_target(cluster: &Cluster) -> Result<Option<String>> {
    Client::new(&cluster.env, &cluster.env.target)?.digest_of("mirror/app", "1.0").await
}

/// Which pod leads, and since when.
async fn lease(cluster: &Cluster) -> Result<Value> {
    Ok(cluster.get(SYSTEM, "lease imagemirror").await?["spec"].take())
}

fn is_ready(mirror: &Value) -> bool {
    let status = &mirror["status"];
    let conditions = status["conditions"].as_array();
    let has = |condition: &Value| condition["type"] == "Ready" && condition["status"] == "True";
    status["synced"] == "1/1" && conditions.is_some_and(|conditions| conditions.iter().any(has))
}

/// The kubelet's probes have killed no container.
async fn no_restarts(cluster: &Cluster) -> Result<()> {
    let pods = cluster.get(SYSTEM, "pods").await?;
    for pod in pods["items"].as_array().into_iter().flatten() {
        let restarts = &pod["status"]["containerStatuses"][0]["restartCount"];
        ensure!(*restarts == 0, "{} has restarted {restarts} times", pod["metadata"]["name"]);
    }
    Ok(())
}
