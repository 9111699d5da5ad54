//! A finished training run told to an MLflow server over its REST API: parameters, and every loss by step. Only a
//! manifest that names a server makes anything leave the machine, and then numbers and parameters do, never rows.
//! Knows HTTP and four calls of `/api/2.0/mlflow`; nothing of training.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reqwest::Url;
use reqwest::blocking::{Client, RequestBuilder};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use super::tensorboard::Scalar;

/// MLflow takes no more of each in one call.
const METRICS_MAX: usize = 1000;
const PARAMS_MAX: usize = 100;
/// MLflow cuts or refuses longer values.
const PARAM_CHARS_MAX: usize = 500;
const TIMEOUT: Duration = Duration::from_secs(30);

/// The server to tell, and under what name.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Tracking {
    /// The server: `http://localhost:5000`.
    uri: String,
    /// The experiment; made if the server does not have it.
    experiment: String,
    /// The environment variable that holds a bearer token, where the server wants one.
    token_env: Option<String>,
}

/// What a run has to say.
pub(super) struct Record<'a> {
    pub(super) run_name: &'a str,
    pub(super) params: Vec<(String, String)>,
    pub(super) scalars: &'a [Scalar],
}

/// Why the server was not told.
#[derive(Debug, thiserror::Error)]
pub(super) enum TrackingError {
    #[error("the environment variable `{variable}` with the token of the MLflow server is not set")]
    MissingToken { variable: String },
    #[error("the MLflow server at `{uri}` cannot be asked for `{call}`: {reason}")]
    Unreachable { uri: String, call: String, reason: String },
    #[error("the MLflow server at `{uri}` answers `{call}` with {status}: {text}")]
    Refused { uri: String, call: String, status: u16, text: String },
    #[error("the server at `{uri}` answers `{call}` without an id; is it an MLflow server?")]
    NoId { uri: String, call: String },
}

impl Tracking {
    /// Writes `record` as one finished run of the experiment.
    pub(super) fn log(&self, record: &Record<'_>) -> Result<(), TrackingError> {
        let server = Server::new(self)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        let experiment = server.experiment(&self.experiment)?;
        let created = server.post(
            "runs/create",
            &json!({ "experiment_id": experiment, "start_time": now, "run_name": record.run_name }),
        )?;
        let run = server.id("runs/create", created.pointer("/run/info/run_id"))?;
        for params in record.params.chunks(PARAMS_MAX) {
            let params: Vec<Value> = params
                .iter()
                .map(|(key, value)| {
                    json!({ "key": key, "value": value.chars().take(PARAM_CHARS_MAX).collect::<String>() })
                })
                .collect();
            server.post("runs/log-batch", &json!({ "run_id": run, "params": params }))?;
        }
        for scalars in record.scalars.chunks(METRICS_MAX) {
            let metrics: Vec<Value> = scalars
                .iter()
                .map(|scalar| {
                    // MLflow keeps slashes in names as folders of its page.
                    json!({ "key": scalar.tag, "value": scalar.value, "timestamp": now, "step": scalar.step })
                })
                .collect();
            server.post("runs/log-batch", &json!({ "run_id": run, "metrics": metrics }))?;
        }
        let end = json!({ "run_id": run, "status": "FINISHED", "end_time": now });
        server.post("runs/update", &end).map(|_| ())
    }
}

/// A connection to an MLflow server.
struct Server<'a> {
    uri: &'a str,
    token: Option<String>,
    client: Client,
}

impl<'a> Server<'a> {
    fn new(tracking: &'a Tracking) -> Result<Self, TrackingError> {
        let token = match &tracking.token_env {
            None => None,
            Some(variable) => match std::env::var(variable) {
                Ok(token) if !token.trim().is_empty() => Some(token.trim().to_owned()),
                _ => return Err(TrackingError::MissingToken { variable: variable.clone() }),
            },
        };
        // Fails only if a provider is installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let uri = tracking.uri.trim_end_matches('/');
        let mut client = Client::builder().timeout(TIMEOUT);
        if uri.contains("://localhost") || uri.contains("://127.") {
            client = client.no_proxy();
        }
        let client = client.build().map_err(|error| {
            let reason = error.to_string();
            TrackingError::Unreachable { uri: uri.to_owned(), call: "a connection".to_owned(), reason }
        })?;
        Ok(Self { uri, token, client })
    }

    /// The id of the experiment of this name.
    fn experiment(&self, name: &str) -> Result<Value, TrackingError> {
        let call = "experiments/get-by-name";
        let mut url = Url::parse(&self.url(call)).map_err(|error| TrackingError::Unreachable {
            uri: self.uri.to_owned(),
            call: call.to_owned(),
            reason: error.to_string(),
        })?;
        url.query_pairs_mut().append_pair("experiment_name", name);
        match self.send(call, self.client.get(url)) {
            Ok(found) => self.id(call, found.pointer("/experiment/experiment_id")),
            Err(TrackingError::Refused { status: 404, .. }) => {
                let call = "experiments/create";
                self.id(call, self.post(call, &json!({ "name": name }))?.get("experiment_id"))
            }
            Err(error) => Err(error),
        }
    }

    /// What `call` was made for; a server that answers well but without it is another kind of server.
    fn id(&self, call: &str, found: Option<&Value>) -> Result<Value, TrackingError> {
        let missing = || TrackingError::NoId { uri: self.uri.to_owned(), call: call.to_owned() };
        found.filter(|id| id.is_string()).cloned().ok_or_else(missing)
    }

    fn post(&self, call: &str, body: &Value) -> Result<Value, TrackingError> {
        self.send(call, self.client.post(self.url(call)).json(body))
    }

    fn url(&self, call: &str) -> String {
        format!("{}/api/2.0/mlflow/{call}", self.uri)
    }

    fn send(&self, call: &str, request: RequestBuilder) -> Result<Value, TrackingError> {
        let unreachable = |error: &reqwest::Error| TrackingError::Unreachable {
            uri: self.uri.to_owned(),
            call: call.to_owned(),
            reason: if error.is_timeout() { "no answer in time".to_owned() } else { error.to_string() },
        };
        let request = match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        };
        let response = request.send().map_err(|error| unreachable(&error))?;
        let status = response.status();
        let text = response.text().map_err(|error| unreachable(&error))?;
        if !status.is_success() {
            let text = text.chars().take(200).collect();
            let (uri, call) = (self.uri.to_owned(), call.to_owned());
            return Err(TrackingError::Refused { uri, call, status: status.as_u16(), text });
        }
        Ok(serde_json::from_str(&text).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::TcpListener;
    use std::thread::JoinHandle;

    use super::*;

    /// A server that answers as MLflow does and gives back the calls it got: path and body.
    fn server(calls: usize, knows_experiment: bool) -> (String, JoinHandle<Vec<(String, Value)>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("http://{}", listener.local_addr().unwrap());
        let heard = std::thread::spawn(move || {
            (0..calls)
                .map(|_| {
                    let (mut stream, _) = listener.accept().unwrap();
                    let mut reader = BufReader::new(stream.try_clone().unwrap());
                    let (mut line, mut length) = (String::new(), 0);
                    reader.read_line(&mut line).unwrap();
                    let path = line.split(' ').nth(1).unwrap().to_owned();
                    loop {
                        let mut header = String::new();
                        reader.read_line(&mut header).unwrap();
                        let header = header.trim().to_lowercase();
                        if let Some(value) = header.strip_prefix("content-length:") {
                            length = value.trim().parse().unwrap();
                        }
                        if header.is_empty() {
                            break;
                        }
                    }
                    let mut body = vec![0; length];
                    reader.read_exact(&mut body).unwrap();
                    let (status, answer) = match &path {
                        path if path.contains("get-by-name") && !knows_experiment => {
                            ("404 Not Found", json!({}))
                        }
                        path if path.contains("get-by-name") => {
                            ("200 OK", json!({ "experiment": { "experiment_id": "7" } }))
                        }
                        path if path.contains("experiments/create") => {
                            ("200 OK", json!({ "experiment_id": "8" }))
                        }
                        path if path.contains("runs/create") => {
                            ("200 OK", json!({ "run": { "info": { "run_id": "r1" } } }))
                        }
                        _ => ("200 OK", json!({})),
                    };
                    let answer = answer.to_string();
                    write!(
                        stream,
                        "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{answer}",
                        answer.len()
                    )
                    .unwrap();
                    (path, serde_json::from_slice(&body).unwrap_or_default())
                })
                .collect()
        });
        (uri, heard)
    }

    fn tracking(uri: String) -> Tracking {
        Tracking { uri, experiment: "notes".into(), token_env: None }
    }

    #[test]
    fn a_server_of_another_kind_is_named() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("http://{}", listener.local_addr().unwrap());
        let page = std::thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            let mut head = BufReader::new(stream.try_clone().unwrap()).lines();
            while !head.next().unwrap().unwrap().is_empty() {}
            let text = "HTTP/1.1 200 OK\r\ncontent-length: 13\r\nconnection: close\r\n\r\n<html></html>";
            stream.write_all(text.as_bytes()).unwrap();
        });
        let record = Record { run_name: "adapter", params: Vec::new(), scalars: &[] };
        let error = tracking(uri).log(&record).unwrap_err().to_string();
        page.join().unwrap();
        assert!(error.ends_with("without an id; is it an MLflow server?"), "{error}");
    }

    #[test]
    fn a_run_is_told_in_mlflow_s_words() {
        let scalars: Vec<Scalar> =
            (1..=1001).map(|step| Scalar { tag: "train/loss", step, value: 0.5 }).collect();
        for knows_experiment in [true, false] {
            let calls = if knows_experiment { 6 } else { 7 };
            let (uri, heard) = server(calls, knows_experiment);
            let params = vec![("rank".to_owned(), "16".to_owned())];
            tracking(uri).log(&Record { run_name: "adapter", params, scalars: &scalars }).unwrap();
            let heard = heard.join().unwrap();
            let last = |end: &str| {
                let call = heard.iter().rev().find(|(path, _)| path.ends_with(end));
                call.unwrap_or_else(|| panic!("no call of {end}")).1.clone()
            };
            assert_eq!(heard[0].0, "/api/2.0/mlflow/experiments/get-by-name?experiment_name=notes");
            assert_eq!(last("runs/create")["experiment_id"], if knows_experiment { "7" } else { "8" });
            let batches: Vec<&Value> =
                heard.iter().filter(|(path, _)| path.ends_with("log-batch")).map(|(_, body)| body).collect();
            assert_eq!(batches[0]["params"][0], json!({ "key": "rank", "value": "16" }));
            assert_eq!(batches[1]["metrics"].as_array().unwrap().len(), 1000);
            assert_eq!(batches[2]["metrics"][0]["step"], 1001);
            assert_eq!(
                (&last("runs/update")["run_id"], &last("runs/update")["status"]),
                (&json!("r1"), &json!("FINISHED"))
            );
        }
    }

    #[test]
    fn a_server_that_is_not_there_is_named() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        let record = Record { run_name: "adapter", params: Vec::new(), scalars: &[] };
        let error = tracking(uri.clone()).log(&record).unwrap_err().to_string();
        assert!(error.starts_with(&format!("the MLflow server at `{uri}` cannot be asked")), "{error}");
        let secret = Tracking { token_env: Some("TUNESMITH_NO_SUCH_TOKEN".into()), ..tracking(uri) };
        assert!(matches!(secret.log(&record), Err(TrackingError::MissingToken { .. })));
    }
}
