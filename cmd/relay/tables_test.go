package main

import (
	"encoding/json"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/txbox/txbox/internal/testenv"
)

func TestMigrateGoesUpAndDown(t *testing.T) {
	db := testenv.EmptySchema(t)
	for _, step := range []struct {
		args string
		code int
		want string
	}{
		{"migrate status", 0, "at version 0 of 1"},
		{"status", 1, "migrate"},
		{"migrate up", 0, "at version 1 of 1"},
		{"migrate up", 0, "at version 1 of 1"},
		{"migrate status", 0, "at version 1 of 1"},
		{"migrate down", 2, "--yes"},
		{"migrate force 7", 1, "7"},
		{"migrate force 1", 0, "at version 1 of 1"},
		{"migrate down --yes", 0, "at version 0 of 1"},
		{"migrate print", 0, "CREATE TABLE outbox"},
		{"version", 0, "relay "},
		{"migrate sideways", 2, "sideways"},
		{"dance", 2, "dance"},
	} {
		args := strings.Fields(step.args)
		environ := []string{"DATABASE_URL=" + db.URL, "TXBOX_SCHEMA=" + db.Schema}
		if text, code := runProgram(t, environ, args...); code != step.code || !strings.Contains(text, step.want) {
			t.Errorf("relay %s: exit code %d, want %q in:\n%s", step.args, code, step.want, text)
		}
	}
}

func TestMigrateDownRefusesToLoseMessages(t *testing.T) {
	db := testenv.Schema(t)
	write(t, db, "queue")
	text, code := runProgram(t, []string{"DATABASE_URL=" + db.URL}, "migrate", "down", "--yes", "--schema", db.Schema)
	if code != 1 || !strings.Contains(text, "messages would be lost") {
		t.Errorf("exit code %d:\n%s", code, text)
	}
}

func TestStatusShowsWhatWaitsAndWhoPublishes(t *testing.T) {
	db := testenv.Schema(t)
	environ := []string{"DATABASE_URL=" + db.URL, "TXBOX_SCHEMA=" + db.Schema, "AMQP_URL=" + testenv.AMQPURL(t)}
	write(t, db, "queue")
	text, code := runProgram(t, environ, "status")
	for _, want := range []string{"schema", db.Schema, "pending", "1, the oldest ", "parked: dead", "relays", "lanes that nobody publishes  64 of 64"} {
		if code != 0 || !strings.Contains(text, want) {
			t.Errorf("exit code %d, %q is not in:\n%s", code, want, text)
		}
	}
	relay := start(t, environ, "run", "--name", "first\nrelay")
	var s status
	testenv.Eventually(t, 30*time.Second, "the relay owns all lanes and has parked what nobody takes", func() bool {
		text, code := runProgram(t, environ, "status", "--json")
		if code != 0 {
			t.Fatalf("exit code %d:\n%s", code, text)
		}
		must(t, json.Unmarshal([]byte(text), &s))
		return s.Pending == 0 && s.Parked["retry"] == 1 && len(s.Relays) == 1 && s.Relays[0].Lanes == 64
	})
	if r := s.Relays[0]; r.Name != "first\nrelay" || r.LeaseLeftSeconds <= 0 || r.LeaseLeftSeconds > 15 || s.LanesWithoutLive != 0 {
		t.Errorf("%+v", s)
	}
	if text, _ := runProgram(t, environ, "status"); !strings.Contains(text, `"first\nrelay"`) || !strings.Contains(text, "64 lanes, lease ends in") {
		t.Error(text)
	}
	relay.signal(t, syscall.SIGTERM)
	if code := relay.exit(t); code != 0 {
		t.Errorf("exit code %d:\n%s", code, relay.output)
	}
}

func TestStatusCountsExactlyUpToItsLimit(t *testing.T) {
	db := testenv.Schema(t)
	_, err := db.Exec(testenv.Context(t), `INSERT INTO `+db.Table("outbox")+` (message_id, exchange, routing_key, payload)
		SELECT gen_random_uuid(), '', 'queue', '' FROM generate_series(1, 10001)`)
	must(t, err)
	if text, code := runProgram(t, []string{"DATABASE_URL=" + db.URL}, "status", "--schema", db.Schema); code != 0 || !strings.Contains(text, "more than 10000") {
		t.Errorf("exit code %d:\n%s", code, text)
	}
	_, err = db.Exec(testenv.Context(t), "DELETE FROM "+db.Table("outbox")+" WHERE id = (SELECT min(id) FROM "+db.Table("outbox")+")")
	must(t, err)
	if text, code := runProgram(t, []string{"DATABASE_URL=" + db.URL}, "status", "--schema", db.Schema); code != 0 || !strings.Contains(text, " 10000, the") {
		t.Errorf("exit code %d:\n%s", code, text)
	}
}

func TestStatusEndsIfTheDatabaseDoesNotAnswer(t *testing.T) {
	text, code := runProgram(t, []string{"DATABASE_URL=postgres://127.0.0.1:1/db"}, "status")
	if code != 1 || !strings.Contains(text, "127.0.0.1") {
		t.Errorf("exit code %d:\n%s", code, text)
	}
}
