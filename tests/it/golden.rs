//! What every command prints, as it was when somebody last looked: `make golden` writes `tests/golden` anew, and a review
//! shows what has changed. What differs from run to run is masked.

use std::{fmt::Write as _, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};
use regex::Regex;
use serde_json::{Value, json};
use testenv::{Registry, images::Image};

use crate::support::{Place, golden};

/// A session: commands, what they print, how they end.
pub(crate) struct Session<'a> {
    place: &'a Place,
    masks: Vec<(Regex, String)>,
    pub(crate) text: String,
}

impl<'a> Session<'a> {
    pub(crate) fn new(place: &'a Place) -> Result<Self> {
        let env = place.env;
        let words = [
            (&*env.source.host, "source.example"),
            (&*env.target.host, "target.example"),
            (&*env.open.host, "open.example"),
            (&*env.apiserver, "https://kubernetes.example"),
            (&*env.run_dir.to_string_lossy(), "DIR"),
            (&*place.prefix, "team"),
            (&*place.namespace, "team"),
        ];
        let mut masks = Vec::new();
        for (word, shown) in words {
            masks.push((Regex::new(&regex::escape(word))?, shown.to_owned()));
        }
        for (pattern, shown) in [
            (r"sha256:[0-9a-f]{64}", "sha256:…"),
            (r"sha256:[0-9a-f]{12}\b", "sha256:…"),
            (r"\b[0-9]+\.[0-9] s\b", "1.0 s"),
            // Columns are as wide as what has been masked.
            (r" {3,}", "   "),
            (r"127\.0\.0\.1:[0-9]+", "host.example"),
        ] {
            masks.push((Regex::new(pattern)?, shown.to_owned()));
        }
        Ok(Self { place, masks, text: String::new() })
    }

    /// Masks ages, too.
    pub(crate) fn with_ages(mut self) -> Result<Self> {
        self.masks.push((Regex::new(r"\b[0-9]+s\b")?, "1s".to_owned()));
        Ok(self)
    }

    pub(crate) fn masked(&self, text: &str) -> String {
        let masked = |text: String, (mask, shown): &(Regex, String)| mask.replace_all(&text, shown).into_owned();
        self.masks.iter().fold(text.to_owned(), masked)
    }

    /// Runs a command and gives what it printed to standard output; lines there may come in any order.
    pub(crate) fn run(&mut self, shown: &str, command: &mut Command) -> Result<String> {
        let output = command.current_dir(&self.place.env.run_dir).output()?;
        let (out, err) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
        for debug in ["Error {", "Some(", "Err(", "Status {", "panicked", "ErrorKind"] {
            ensure!(!out.contains(debug) && !err.contains(debug), "{shown} prints {debug}: {out}{err}");
        }
        let shown = self.masked(shown);
        writeln!(self.text, "$ {shown}")?;
        for part in [&out, &err] {
            self.text += &self.masked(part);
        }
        writeln!(self.text, "[{}]\n", output.status.code().context("killed")?)?;
        Ok(out)
    }

    /// The same for the program itself, with nobody's logins.
    pub(crate) fn imagemirror(&mut self, arguments: &str) -> Result<String> {
        let mut command = imagemirror(self.place)?;
        command.args(arguments.split(' '));
        self.run(&format!("imagemirror {arguments}"), &mut command)
    }

    pub(crate) fn check(&self, name: &str) -> Result<()> {
        golden(&format!("tests/golden/screens/{name}.txt"), &format!("{}\n", self.text.trim_end()))
    }
}

fn imagemirror(place: &Place) -> Result<Command> {
    let home = place.env.run_dir.join("no-docker-configuration");
    std::fs::create_dir_all(&home)?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_imagemirror"));
    command.env("DOCKER_CONFIG", home).env_remove("KUBECONFIG").env("HOME", &place.env.run_dir);
    Ok(command)
}

/// A file for the command line, in the directory that sessions run in, and its name.
pub(crate) fn file(place: &Place, name: &str, documents: &[Value]) -> Result<String> {
    let name = format!("{}-{name}.yaml", place.namespace);
    let text: Vec<String> = documents.iter().map(Value::to_string).collect();
    std::fs::write(place.env.run_dir.join(&name), text.join("\n---\n"))?;
    Ok(name)
}

pub(crate) fn mirror(place: &Place, spec: &Value) -> Value {
    json!({
        "apiVersion": "imagemirror.dev/v1alpha1", "kind": "ImageMirror",
        "metadata": {"name": "m", "namespace": place.namespace}, "spec": spec,
    })
}

/// The Secrets that `Place::spec` names.
pub(crate) fn secrets(place: &Place) -> [Value; 3] {
    let login = |name: &str, registry: &Registry| {
        let content = registry.dockerconfigjson();
        place.document(name, "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", &content)])
    };
    let ca = place.document("ca", "Opaque", &[("ca.crt", &place.env.ca_pem)]);
    [login("pull", &place.env.source), login("push", &place.env.target), ca]
}

#[tokio::test]
async fn a_plan_and_a_sync() -> Result<()> {
    let place = Place::new("screens").await?;
    let (source, target) = (&place.env.source, &place.env.target);
    place.push(source, "agent", "1", &Image::single(1, &[2_000_000])).await?;
    place.push(source, "tool", "1", &Image::single(2, &[1000])).await?;
    place.push(target, "tool", "1", &Image::single(3, &[1000])).await?;
    let documents = |images: &[(&str, &[&str])], changes: &Value| {
        let mut spec = place.spec(source, target, images);
        spec.as_object_mut().context("spec")?.extend(changes.as_object().context("changes")?.clone());
        Ok::<_, anyhow::Error>([&[mirror(&place, &spec)][..], &secrets(&place)].concat())
    };
    let mut session = Session::new(&place)?;
    let all = file(&place, "all", &documents(&[("agent", &["1"]), ("tool", &["1", "2"])], &json!({}))?)?;
    let never = json!({"policy": {"overwrite": "Never"}});
    let never = file(&place, "never", &documents(&[("tool", &["1"])], &never)?)?;
    session.imagemirror(&format!("sync -f {never}"))?;
    session.imagemirror(&format!("plan -f {all}"))?;
    // One image after the other, so that lines have an order.
    for name in ["agent", "tool", "none"] {
        let one = file(&place, name, &documents(&[(name, &["1"])], &json!({}))?)?;
        session.imagemirror(&format!("sync -f {one}"))?;
    }
    let agent = file(&place, "agent", &documents(&[("agent", &["1"])], &json!({}))?)?;
    session.imagemirror(&format!("plan -f {agent}"))?;
    session.imagemirror(&format!("sync -f {agent} --to oci:{}-layout", place.namespace))?;
    session.imagemirror(&format!("plan -f {agent} --from oci:{}-layout", place.namespace))?;
    session.check("sync")?;
    // As JSON there is one document on standard output and nothing else.
    for command in ["plan", "sync", "sync --progress none", "sync --progress plain"] {
        let report: Value = serde_json::from_str(&session.imagemirror(&format!("{command} -f {all} -o json"))?)?;
        ensure!(report["mirrors"][0]["images"].as_array().is_some_and(|images| images.len() == 3), "{report:#}");
    }
    Ok(())
}

#[tokio::test]
async fn what_is_wrong_where_and_what_to_do() -> Result<()> {
    let place = Place::new("errors").await?;
    let (source, target) = (&place.env.source, &place.env.target);
    let mut session = Session::new(&place)?;
    let write = |name: &str, text: &str| -> Result<String> {
        let name = format!("{}-{name}", place.namespace);
        std::fs::write(place.env.run_dir.join(&name), text)?;
        Ok(name)
    };
    let good = || place.spec(source, target, &[("agent", &["1"])]);
    let changed = |pointer: &str, value: Value| {
        let mut spec = good();
        *spec.pointer_mut(pointer).context("no such field")? = value;
        Ok::<_, anyhow::Error>(spec)
    };
    let with = |key: &str, value: Value| {
        let mut spec = good();
        spec[key] = value;
        spec
    };
    let validate = |session: &mut Session<'_>, name: &str, documents: &[Value]| -> Result<()> {
        let name = file(&place, name, documents)?;
        session.imagemirror(&format!("validate -f {name}")).map(|_| ())
    };
    validate(&mut session, "good", &[mirror(&place, &good())])?;
    for name in ["no-such-file", "."] {
        session.imagemirror(&format!("validate -f {name}"))?;
    }
    let broken = write("broken.yaml", "a: [1\nb: secret")?;
    session.imagemirror(&format!("validate -f {broken}"))?;
    validate(&mut session, "empty", &[])?;
    validate(&mut session, "pod", &[json!({"apiVersion": "v1", "kind": "Pod"})])?;
    validate(&mut session, "list", &[json!([1])])?;
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "data": {"password": "hunter2 is no base64"}});
    validate(&mut session, "secret", &[secret])?;
    validate(&mut session, "untyped", &[mirror(&place, &with("images", json!("agent")))])?;
    validate(&mut session, "unknown", &[mirror(&place, &with("imagess", json!([])))])?;
    validate(&mut session, "source", &[mirror(&place, &changed("/images/0/source", json!("https://gcr.io/a"))?)])?;
    validate(&mut session, "interval", &[mirror(&place, &with("interval", json!("1s")))])?;
    validate(&mut session, "schedule", &[mirror(&place, &with("schedule", json!("61 * * * *")))])?;
    let mut other = mirror(&place, &good());
    other["metadata"]["name"] = json!("other");
    validate(&mut session, "twice", &[mirror(&place, &good()), other])?;

    // What registries and Secrets can do.
    let [pull, push, ca] = secrets(&place);
    let sync = |session: &mut Session<'_>, name: &str, documents: &[Value]| -> Result<()> {
        let name = file(&place, name, documents)?;
        session.imagemirror(&format!("sync -f {name}")).map(|_| ())
    };
    let all = |spec: &Value| vec![mirror(&place, spec), pull.clone(), push.clone(), ca.clone()];
    sync(&mut session, "no-push", &[mirror(&place, &good()), pull.clone(), ca.clone()])?;
    sync(&mut session, "account", &all(&with("serviceAccountName", json!("builder"))))?;
    let wrong = source.dockerconfigjson().replace("\"auths\"", "\"nothing\"");
    let wrong = place.document("pull", "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", &wrong)]);
    sync(&mut session, "no-entry", &[mirror(&place, &good()), wrong, push.clone(), ca.clone()])?;
    let password = source.password.clone().context("a password")?;
    let wrong =
        json!({"auths": {&source.host: {"username": "puller", "password": format!("not-{password}")}}}).to_string();
    let wrong = place.document("pull", "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", &wrong)]);
    sync(&mut session, "unauthorized", &[mirror(&place, &good()), wrong, push.clone(), ca.clone()])?;
    sync(&mut session, "no-tag", &all(&good()))?;
    sync(&mut session, "no-host", &all(&changed("/images/0/source", json!("registry.invalid/agent"))?))?;
    sync(&mut session, "no-ca", &all(&with("registries", json!([])))[..])?;
    session.imagemirror("sync -f x --to directory")?;
    session.imagemirror("sync -f x --from oci:no-such-directory")?;
    session.imagemirror("sync")?;
    session.imagemirror("nonsense")?;
    session.imagemirror("import regsync no-such-file")?;
    let passwords = write("regsync.yml", "creds:\n- pass: hunter2\n  registry: [")?;
    session.imagemirror(&format!("import regsync {passwords}"))?;
    session.imagemirror("operator --kubeconfig no-such-file")?;
    session.imagemirror("operator --config no-such-file")?;
    ensure!(!session.text.contains("hunter2") && !session.text.contains(&password), "a password is printed");
    session.check("errors")?;
    // What, where; what to do.
    for line in session.text.lines().filter(|line| line.starts_with("imagemirror: ")) {
        ensure!(
            line.contains("; ") || line.contains(", write ") || line.contains(": write "),
            "nothing says what to do: {line}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn imports_say_what_has_no_equal() -> Result<()> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/import");
    for (format, file) in [("regsync", "regsync.yml"), ("portager", "portager.yaml")] {
        let mut import = Command::new(env!("CARGO_BIN_EXE_imagemirror"));
        import.args(["import", format]).arg(root.join(file));
        let printed = crate::support::run(&mut import, None)?;
        golden(&format!("tests/golden/import/{format}.out.yaml"), &printed)?;
        let mut validate = Command::new(env!("CARGO_BIN_EXE_imagemirror"));
        let valid = crate::support::run(validate.args(["validate", "-f", "-"]), Some(&printed))?;
        ensure!(valid.lines().count() == printed.matches("kind: ImageMirror").count(), "{valid}");
    }
    Ok(())
}

#[test]
fn the_reference_has_the_help_of_every_command() -> Result<()> {
    const BEGIN: &str = "<!-- help of `";
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/cli.md");
    let page = std::fs::read_to_string(&path)?;
    let mut written = String::new();
    let mut parts = page.split(BEGIN);
    written += parts.next().unwrap_or_default();
    let mut described = Vec::new();
    for part in parts {
        let (command, rest) = part.split_once("` -->\n").context("a mark without an end")?;
        let (_, rest) = rest.split_once("\n```\n").context("a block without an end")?;
        let help = help(command)?;
        write!(written, "{BEGIN}{command}` -->\n```text\n{help}\n```\n{rest}")?;
        described.push(command.to_owned());
    }
    for (program, shown) in [("imagemirror", "imagemirror"), ("kubectl-imagemirror", "kubectl imagemirror")] {
        for subcommand in subcommands(program)? {
            let command = format!("{shown} {subcommand}");
            ensure!(described.contains(&command), "docs/cli.md does not describe {command}");
        }
    }
    golden("docs/cli.md", &written)
}

/// `--help` of a command as people write it.
fn help(command: &str) -> Result<String> {
    let (program, arguments) = match command.strip_prefix("kubectl imagemirror") {
        Some(rest) => ("kubectl-imagemirror", rest),
        None => ("imagemirror", command.strip_prefix("imagemirror").context("another program")?),
    };
    let mut asked = called(program);
    let help = asked.args(arguments.split_whitespace()).arg("--help").env_clear().output()?;
    let lines: Vec<String> = String::from_utf8(help.stdout)?.lines().map(|line| line.trim_end().to_owned()).collect();
    Ok(lines.join("\n"))
}

fn subcommands(program: &str) -> Result<Vec<String>> {
    let help = String::from_utf8(called(program).arg("--help").output()?.stdout)?;
    let (_, commands) = help.split_once("Commands:\n").context("no commands")?;
    let commands = commands.lines().take_while(|line| !line.is_empty());
    let names = commands.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let names = names.filter_map(|line| line.split_whitespace().next());
    Ok(names.filter(|name| *name != "help").map(ToOwned::to_owned).collect())
}

/// The program under another name.
fn called(name: &str) -> Command {
    let program = PathBuf::from(env!("CARGO_BIN_EXE_imagemirror"));
    let mut command = Command::new(&program);
    std::os::unix::process::CommandExt::arg0(&mut command, name);
    command
}

#[test]
fn shells_take_the_completion() -> Result<()> {
    for (shell, expected) in
        [("bash", "complete -F _imagemirror"), ("zsh", "#compdef imagemirror"), ("fish", "complete -c imagemirror")]
    {
        let script = String::from_utf8(called("imagemirror").args(["completion", shell]).output()?.stdout)?;
        ensure!(script.contains(expected) && script.contains("validate"), "{shell}: {script}");
        if shell == "bash" {
            crate::support::run(Command::new("bash").args(["-n"]), Some(&script))?;
        }
    }
    Ok(())
}
