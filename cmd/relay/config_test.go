package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const (
	goodDB   = "DATABASE_URL=postgres://u:S3cret@127.0.0.1:1/db"
	goodAMQP = "AMQP_URL=amqp://u:S3cret@127.0.0.1:1/"
)

func TestEveryMistakeIsNamedAndEndsWith2(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty")
	must(t, os.WriteFile(empty, []byte("\n"), 0o600))
	for name, test := range map[string]struct {
		environ []string
		args    []string
		want    string
	}{
		"no database":             {environ: []string{goodAMQP}, want: "--database-url: not set; nor is $DATABASE_URL"},
		"no broker":               {environ: []string{goodDB}, want: "--amqp-url: not set; nor is $AMQP_URL"},
		"malformed database":      {environ: []string{"DATABASE_URL=postgres://u:S3cret%zz@127.0.0.1/db", goodAMQP}, want: "--database-url: malformed"},
		"bad sslmode":             {environ: []string{goodDB + "?sslmode=S3", goodAMQP}, want: "--database-url: sslmode is invalid"},
		"plaintext database":      {environ: []string{"DATABASE_URL=postgres://u:S3cret@db.example/db", goodAMQP}, want: `plaintext to "db.example"`},
		"plaintext broker":        {environ: []string{goodDB, "AMQP_URL=amqp://u:S3cret@mq.example"}, want: `plaintext to "mq.example"`},
		"comma in one broker":     {environ: []string{goodDB, "AMQP_URL=amqp://u:S3cret@127.0.0.1:1,127.0.0.1:2"}, want: "AMQP URL 2"},
		"unknown variable":        {environ: []string{goodDB, goodAMQP, "TXBOX_LEESE=1s"}, want: "$TXBOX_LEESE: there is no such setting"},
		"unknown flag":            {environ: []string{goodDB, goodAMQP}, args: []string{"--leese=1s"}, want: "--leese"},
		"no duration":             {environ: []string{goodDB, goodAMQP}, args: []string{"--lease=soon"}, want: `--lease: "soon"`},
		"duration by variable":    {environ: []string{goodDB, goodAMQP, "TXBOX_RETRY_FOR=7d"}, want: `--retry-for: "7d"`},
		"zero":                    {environ: []string{goodDB, goodAMQP}, args: []string{"--idle-interval=0s"}, want: "--idle-interval: 0s is not above zero"},
		"negative":                {environ: []string{goodDB, goodAMQP}, args: []string{"--stop-timeout=-1s"}, want: "--stop-timeout: -1s"},
		"negative write":          {environ: []string{goodDB, goodAMQP}, args: []string{"--write-timeout=-1s"}, want: "--write-timeout: -1s"},
		"lease below confirm":     {environ: []string{goodDB, goodAMQP}, args: []string{"--lease=14s"}, want: "--lease: 14s is shorter than --confirm-timeout, 15s"},
		"schema with a semicolon": {environ: []string{goodDB, goodAMQP}, args: []string{"--schema=outbox; drop table x"}, want: "--schema"},
		"schema with a quote":     {environ: []string{goodDB, goodAMQP}, args: []string{`--schema=Ou"tbox`}, want: "--schema"},
		"schema with a dot":       {environ: []string{goodDB, goodAMQP}, args: []string{"--schema=a.b"}, want: "--schema"},
		"schema too long":         {environ: []string{goodDB, goodAMQP}, args: []string{"--schema=" + strings.Repeat("s", 64)}, want: "--schema"},
		"schema of PostgreSQL":    {environ: []string{goodDB, goodAMQP}, args: []string{"--schema=pg_catalog"}, want: "--schema"},
		"name too long":           {environ: []string{goodDB, goodAMQP}, args: []string{"--name=" + strings.Repeat("é", 128)}, want: "Name"},
		"toggle":                  {environ: []string{goodDB, goodAMQP, "TXBOX_ALLOW_PLAINTEXT=maybe"}, want: `--allow-plaintext: "maybe"`},
		"log level":               {environ: []string{goodDB, goodAMQP}, args: []string{"--log-level=loud"}, want: "--log-level"},
		"log format":              {environ: []string{goodDB, goodAMQP}, args: []string{"--log-format=xml"}, want: "--log-format"},
		"no CA file":              {environ: []string{goodDB, goodAMQP}, args: []string{"--amqp-tls-ca=/nowhere"}, want: "--amqp-tls-ca"},
		"empty CA file":           {environ: []string{goodDB, goodAMQP}, args: []string{"--amqp-tls-ca=" + empty}, want: "holds no certificate"},
		"certificate, no key":     {environ: []string{goodDB, goodAMQP}, args: []string{"--amqp-tls-cert=" + empty}, want: "one needs the other"},
		"no such file":            {environ: []string{"DATABASE_URL_FILE=/nowhere", goodAMQP}, want: "$DATABASE_URL_FILE"},
		"empty file":              {environ: []string{goodDB, "AMQP_URL_FILE=" + empty}, want: "$AMQP_URL_FILE: the file is empty"},
		"value and file":          {environ: []string{goodDB, "DATABASE_URL_FILE=" + empty, goodAMQP}, want: "both set"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			text, code := runProgram(t, test.environ, append([]string{"run"}, test.args...)...)
			if code != 2 || !strings.Contains(text, test.want) {
				t.Errorf("exit code %d, want %q in:\n%s", code, test.want, text)
			}
			if strings.Contains(text, "S3cret") {
				t.Errorf("a password is shown:\n%s", text)
			}
		})
	}
}

func TestAllMistakesAreReportedAtOnce(t *testing.T) {
	text, code := runProgram(t, []string{"DATABASE_URL=nonsense S3cret", "AMQP_URL=http://u:S3cret@h", "TXBOX_LEESE=1", "TXBOX_ALLOW_PLAINTEXT=x"},
		"run", "--lease=1s", "--confirm-timeout=2s", "--retry-for=0s", "--schema=a.b", "--log-level=x", "--log-format=x",
		"--amqp-tls-ca=/nowhere", "--write-timeout=x")
	if code != 2 || strings.Contains(text, "S3cret") {
		t.Errorf("exit code %d:\n%s", code, text)
	}
	for _, want := range []string{"--database-url", "--amqp-url", "$TXBOX_LEESE", "--allow-plaintext", "--lease", "--retry-for", "--schema",
		"--log-level", "--log-format", "--amqp-tls-ca", "--write-timeout"} {
		if !strings.Contains(text, want) {
			t.Errorf("%s is not in:\n%s", want, text)
		}
	}
}

// A password with anything in it is not shown, encoded as it should be or not, in
// whatever way the URL is wrong.
func TestNoSecretIsEverPrinted(t *testing.T) {
	for _, password := range []string{"S3cret", "?S3cret", "#S3cret", "@S3cret", ":S3cret", "/S3cret", "%S3cret", " S3cret", "S3cret%zz", "S3cret\t",
		"S3cret@", "S3cret/", "S3cret?x=", "S3cret'"} {
		for _, form := range []string{
			"postgres://u:PASS@127.0.0.1:1/db", "postgres://u:PASS@127.0.0.1:1/db?connect_timeout=x", "postgres://u:PASS@db.example/db",
			"postgres://u:PASS@:x/db", "host=127.0.0.1 port=1 password=PASS", "host=127.0.0.1 port=x password='PASS'", "host=db.example password='PASS",
			"postgres://127.0.0.1:1/db?password=PASS&sslmode=x", "PASS",
		} {
			t.Run(form, func(t *testing.T) {
				t.Parallel()
				url := strings.ReplaceAll(form, "PASS", password)
				text, code := runProgram(t, []string{"DATABASE_URL=" + url}, "status", "--timeout=5s")
				if code == 0 || strings.Contains(text, "S3cret") {
					t.Errorf("%q: exit code %d:\n%s", url, code, text)
				}
			})
		}
		url := strings.ReplaceAll("postgres://u:PASS@127.0.0.1:1/db", "PASS", password)
		if text, code := runProgram(t, []string{"DATABASE_URL=" + url}, "migrate", "status"); code == 0 || strings.Contains(text, "S3cret") {
			t.Errorf("%q: exit code %d:\n%s", url, code, text)
		}
		url = strings.ReplaceAll("amqp://u:PASS@mq.example", "PASS", password)
		if text, code := runProgram(t, []string{goodDB, "AMQP_URL=" + url}, "run"); code != 2 || strings.Contains(text, "S3cret") {
			t.Errorf("%q: exit code %d:\n%s", url, code, text)
		}
	}
}

func TestHelpIsNotAFailureAndShowsNoSecret(t *testing.T) {
	for _, args := range [][]string{{}, {"--help"}, {"run", "--help"}, {"migrate", "--help"}, {"status", "--help"}} {
		text, code := runProgram(t, []string{goodDB, goodAMQP}, args...)
		if code != 0 || !strings.Contains(text, "Usage: relay") || strings.Contains(text, "S3cret") {
			t.Errorf("relay %s: exit code %d:\n%s", args, code, text)
		}
	}
}

func TestServicesOfKubernetesAreNoSettings(t *testing.T) {
	environ := []string{"TXBOX_SERVICE_HOST=10.0.0.1", "TXBOX_PORT_80_TCP=tcp://10.0.0.1:80", "DATABASE_URL=postgres://127.0.0.1:1/db"}
	if text, _ := runProgram(t, environ, "migrate", "status"); !strings.Contains(text, "no such setting") {
		t.Errorf("outside Kubernetes:\n%s", text)
	}
	if text, _ := runProgram(t, append(environ, "KUBERNETES_SERVICE_HOST=10.0.0.2"), "migrate", "status"); strings.Contains(text, "no such setting") {
		t.Errorf("inside:\n%s", text)
	}
}
