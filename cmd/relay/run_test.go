package main

import (
	"encoding/json"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/internal/servers/serverstest"
	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/outbox"
)

// write puts a message for queue into the outbox.
func write(t *testing.T, db *testenv.DB, queue string) {
	t.Helper()
	must(t, pgx.BeginFunc(testenv.Context(t), db, func(tx pgx.Tx) error {
		return outbox.Writer{Schema: db.Schema}.Write(testenv.Context(t), tx, outbox.Message{RoutingKey: queue, Payload: []byte("{}")})
	}))
}

// queue declares one on the broker at amqpURL, and returns how many messages it has.
func queue(t *testing.T, amqpURL string) (name string, messages func() int) {
	t.Helper()
	conn, err := amqp.Dial(amqpURL)
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	ch, err := conn.Channel()
	must(t, err)
	name = testenv.Name(t)
	_, err = ch.QueueDeclare(name, true, false, false, false, nil)
	must(t, err)
	t.Cleanup(func() { ch.QueueDelete(name, false, false, false) })
	return name, func() int {
		q, err := ch.QueueDeclarePassive(name, true, false, false, false, nil)
		must(t, err)
		return q.Messages
	}
}

func TestRunPublishesAndASignalEndsItWith0(t *testing.T) {
	db := testenv.Schema(t)
	name, messages := queue(t, testenv.AMQPURL(t))
	dir := t.TempDir()
	file := filepath.Join(dir, "url")
	must(t, os.WriteFile(file, []byte(db.URL+"\n"), 0o600))
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		before := messages()
		relay := start(t, []string{"DATABASE_URL_FILE=" + file, "TXBOX_SCHEMA=" + db.Schema, "AMQP_URL=" + testenv.AMQPURL(t)}, "run", "--log-format=json")
		write(t, db, name)
		testenv.Eventually(t, 20*time.Second, "the message is published", func() bool { return messages() == before+1 })
		relay.signal(t, sig)
		relay.signal(t, sig) // as timeout(1) does: still the first
		if code := relay.exit(t); code != 0 || !strings.Contains(relay.output.String(), "relay: has stopped") {
			t.Errorf("%s: exit code %d:\n%s", sig, code, relay.output)
		}
		for line := range strings.Lines(relay.output.String()) {
			if !json.Valid([]byte(line)) {
				t.Errorf("no JSON: %s", line)
			}
		}
	}
}

func TestRunWaitsForServersThatAreDown(t *testing.T) {
	broker, database := serverstest.RabbitMQ(t), serverstest.Postgres(t)
	db := testenv.SchemaAt(t, database.URL())
	conn, err := amqp.Dial(broker.URL())
	must(t, err)
	ch, err := conn.Channel()
	must(t, err)
	name := testenv.Name(t)
	_, err = ch.QueueDeclare(name, true, false, false, false, nil)
	must(t, err)
	must(t, conn.Close())
	write(t, db, name)
	must(t, broker.Stop(testenv.Context(t)))
	must(t, database.Stop(testenv.Context(t)))

	relay := start(t, []string{"DATABASE_URL=" + database.URL(), "AMQP_URL=" + broker.URL()}, "run", "--schema", db.Schema)
	relay.output.has(t, "database fails")
	must(t, database.Start(testenv.Context(t)))
	relay.output.has(t, "database works")
	relay.output.has(t, "broker fails")
	must(t, broker.Start(testenv.Context(t)))
	conn, err = amqp.Dial(broker.URL())
	must(t, err)
	defer conn.Close()
	ch, err = conn.Channel()
	must(t, err)
	testenv.Eventually(t, 30*time.Second, "the message is published", func() bool {
		q, err := ch.QueueDeclarePassive(name, true, false, false, false, nil)
		must(t, err)
		return q.Messages == 1
	})
	relay.output.has(t, "lease of lanes works")
	relay.signal(t, syscall.SIGTERM)
	if code := relay.exit(t); code != 0 {
		t.Errorf("exit code %d:\n%s", code, relay.output)
	}
}

// The first signal waits for a broker that does not answer, the second does not.
func TestSecondSignalEndsAtOnce(t *testing.T) {
	broker := serverstest.RabbitMQ(t)
	db := testenv.Schema(t)
	name, messages := queue(t, broker.URL())
	relay := start(t, []string{"DATABASE_URL=" + db.URL, "AMQP_URL=" + broker.URL()},
		"run", "--schema", db.Schema, "--stop-timeout=10m", "--confirm-timeout=10m", "--lease=10m", "--write-timeout=10m")
	write(t, db, name)
	holds := func(sql string, args ...any) func() bool {
		return func() (yes bool) {
			must(t, db.QueryRow(testenv.Context(t), sql, args...).Scan(&yes))
			return yes
		}
	}
	// The broker counts a message before it confirms it: only the outbox tells.
	testenv.Eventually(t, 20*time.Second, "the message is published", func() bool { return messages() == 1 })
	testenv.Eventually(t, 20*time.Second, "the message is confirmed", holds("SELECT NOT EXISTS (SELECT FROM "+db.Table("outbox")+")"))
	must(t, broker.Pause())
	t.Cleanup(func() { must(t, broker.Resume()) })
	for range 10 {
		write(t, db, name)
	}
	var written time.Time
	must(t, db.QueryRow(testenv.Context(t), "SELECT clock_timestamp()").Scan(&written))
	testenv.Eventually(t, 20*time.Second, "the relay has read them", holds(`SELECT EXISTS (SELECT FROM pg_stat_activity
		WHERE query LIKE 'WITH page%' AND query LIKE '%' || $1 || '%' AND query_start > $2 AND state = 'idle')`, db.Schema, written))
	relay.signal(t, syscall.SIGTERM)
	select {
	case <-relay.exited:
		t.Fatalf("the first signal did not wait:\n%s", relay.output)
	case <-time.After(300 * time.Millisecond):
	}
	relay.signal(t, syscall.SIGTERM)
	if code := relay.exit(t); code != 1 {
		t.Errorf("exit code %d:\n%s", code, relay.output)
	}
}

// Whoever reads the exit code learns that the stop was not clean, and soon: a
// database that hangs is not waited for beyond the stop timeout.
func TestStopThatIsNotCleanEndsWith1(t *testing.T) {
	database := serverstest.Postgres(t)
	db := testenv.SchemaAt(t, database.URL())
	relay := start(t, []string{"DATABASE_URL=" + database.URL(), "AMQP_URL=" + testenv.AMQPURL(t)},
		"run", "--schema", db.Schema, "--stop-timeout=1s")
	relay.output.has(t, "broker works")
	must(t, database.Pause())
	began := time.Now()
	relay.signal(t, syscall.SIGTERM)
	code := relay.exit(t)
	if took := time.Since(began); code != 1 || took > 8*time.Second || !strings.Contains(relay.output.String(), "relay: not stopped cleanly within 1s") {
		t.Errorf("exit code %d after %s:\n%s", code, took, relay.output)
	}
	must(t, database.Resume())
}

// What servers and clients say of a wrong password does not hold it.
func TestLogShowsNoPasswordThatServersRefuse(t *testing.T) {
	db := testenv.Schema(t)
	wrong := func(raw string) string {
		u, err := url.Parse(raw)
		must(t, err)
		u.User = url.UserPassword(u.User.Username(), "S3cret")
		return u.String()
	}
	for _, test := range []struct{ database, broker, fails string }{
		{wrong(db.URL), testenv.AMQPURL(t), "database fails"},
		{db.URL, wrong(testenv.AMQPURL(t)), "broker fails"},
	} {
		for _, format := range []string{"text", "json"} {
			relay := start(t, []string{"DATABASE_URL=" + test.database, "AMQP_URL=" + test.broker},
				"run", "--schema", db.Schema, "--log-level=debug", "--log-format", format)
			relay.output.has(t, test.fails)
			relay.signal(t, syscall.SIGTERM)
			if code := relay.exit(t); code != 0 || strings.Contains(relay.output.String(), "S3cret") {
				t.Errorf("exit code %d:\n%s", code, relay.output)
			}
		}
	}
	if text, code := runProgram(t, []string{"DATABASE_URL=" + wrong(db.URL)}, "status"); code != 1 || strings.Contains(text, "S3cret") {
		t.Errorf("exit code %d:\n%s", code, text)
	}
	if text, code := runProgram(t, []string{"DATABASE_URL=" + wrong(db.URL)}, "migrate", "up"); code != 1 || strings.Contains(text, "S3cret") {
		t.Errorf("exit code %d:\n%s", code, text)
	}
}

func TestRunRefusesASchemaOfANewerProgram(t *testing.T) {
	db := testenv.Schema(t)
	_, err := db.Exec(testenv.Context(t), "UPDATE "+db.Table("txbox_version")+" SET version = 1000, compatible_since = 1000")
	must(t, err)
	text, code := runProgram(t, []string{"DATABASE_URL=" + db.URL, "AMQP_URL=" + testenv.AMQPURL(t)}, "run", "--schema", db.Schema)
	if code != 1 || !strings.Contains(text, "1000") {
		t.Errorf("exit code %d:\n%s", code, text)
	}
}
