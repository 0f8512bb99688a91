package main

import (
	"strings"
	"testing"
)

// passwords hold S3cret, and what breaks a URL if it is not percent-encoded. The
// digits make a port of what stands before them.
var passwords = []string{
	"S3cret", "?S3cret", "#S3cret", "@S3cret", ":S3cret", "/S3cret", "%S3cret", " S3cret", "S3cret%zz", "S3cret\t", "S3cret@", "S3cret/", "S3cret?x=",
	"S3cret'", ",S3cret", "1/S3cret", "1?S3cret", "1#S3cret", "x@S3cret/y", "x@S3cret:1/y", "S3cret[", "&S3cret", "=S3cret", "\\S3cret",
}

// A password with anything in it is not shown, encoded as it should be or not, in
// whatever way the URL is wrong.
func TestNoSecretIsEverPrinted(t *testing.T) {
	databases := []string{
		"postgres://u:PASS@127.0.0.1:1/db", "postgres://u:PASS@127.0.0.1:1/db?connect_timeout=x", "postgres://u:PASS@db.example/db",
		"postgres://u:PASS@127.0.0.1:1/db?sslmode=disable", "postgres://u:PASS@127.0.0.1:1,127.0.0.1:2/db?sslmode=disable",
		"postgres://u:PASS@:x/db", "host=127.0.0.1 port=1 password=PASS", "host=127.0.0.1 port=x password='PASS'", "host=db.example password='PASS",
		"postgres://127.0.0.1:1/db?password=PASS&sslmode=x", "postgres://127.0.0.1:1/db?password=PASS&port=x", "mysql://u:PASS@127.0.0.1:1/db", "u:PASS@127.0.0.1:1/db", "PASS",
	}
	brokers := []string{
		"amqp://u:PASS@mq.example", "amqp://u:PASS@127.0.0.1:x/", "http://u:PASS@127.0.0.1", "u:PASS@127.0.0.1", "PASS",
		"amqp://u:PASS@mq.example,amqp://u:PASS@mq.example", "amqps://u:PASS@", "amqp://u:PASS@mq.example:99999",
	}
	for _, password := range passwords {
		t.Run(password, func(t *testing.T) {
			t.Parallel()
			for _, form := range databases {
				url := strings.ReplaceAll(form, "PASS", password)
				printsNoSecret(t, []string{"DATABASE_URL=" + url}, "status", "--timeout=3s", "--allow-plaintext")
			}
			for _, form := range brokers {
				url := strings.ReplaceAll(form, "PASS", password)
				printsNoSecret(t, []string{goodDB, "AMQP_URL=" + url}, "run")
			}
			url := strings.ReplaceAll(databases[0], "PASS", password)
			printsNoSecret(t, []string{"DATABASE_URL=" + url}, "migrate", "status")
			printsNoSecret(t, []string{"PGHOST=127.0.0.1", "PGPORT=x", "PGPASSWORD=" + password}, "migrate", "status")
		})
	}
}

// A URL that stands where it should not is not shown either.
func TestNoSecretIsPrintedFromTheWrongPlace(t *testing.T) {
	const url = "postgres://u:S3cret@127.0.0.1/db"
	for _, args := range [][]string{
		{url}, {"run", url}, {"run", "--bogus", url}, {"run", "--bogus=" + url}, {"run", "--" + url}, {"run", "-" + url}, {"run", "-x=" + url},
		{"run", "--lease", url}, {"run", "--name", url, url}, {"run", "--log-level=" + url}, {"run", "--schema", url}, {"run", "--allow-plaintext=" + url},
		{"migrate", url}, {"migrate", "force", url}, {"migrate", "down", "--yes=" + url}, {"status", "--json=" + url}, {"run", "--", url},
		{"run", "host=127.0.0.1 password=S3cret"}, {"run", "--schema", "host=db password=S3cret"}, {"run", "--amqp-tls-ca", url},
		{"run", "--amqp-tls-cert", url, "--amqp-tls-key", "x"}, {"migrate", "force", "password=S3cret"},
	} {
		if code := printsNoSecret(t, []string{goodDB, goodAMQP}, args...); code != 2 {
			t.Errorf("relay %q: exit code %d", args, code)
		}
	}
	for _, name := range append([]string{"TXBOX_LEASE", "TXBOX_SCHEMA", "TXBOX_ALLOW_PLAINTEXT", "TXBOX_LOG_FORMAT", "TXBOX_NO_SUCH"}, "DATABASE_URL_FILE", "AMQP_URL_FILE") {
		if code := printsNoSecret(t, []string{name + "=" + url}, "run"); code != 2 {
			t.Errorf("%s: exit code %d", name, code)
		}
	}
}

// printsNoSecret runs the program, which is to fail, and returns its exit code.
func printsNoSecret(t *testing.T, environ []string, args ...string) int {
	t.Helper()
	text, code := runProgram(t, environ, args...)
	if code != 1 && code != 2 || strings.Contains(text, "S3cret") {
		t.Errorf("%q %q: exit code %d:\n%s", environ, args, code, text)
	}
	return code
}
