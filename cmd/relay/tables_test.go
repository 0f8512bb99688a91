package main

import (
	"encoding/json"
	"maps"
	"net"
	"slices"
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
		{"status", 1, "relay migrate up"},
		{"status --json", 1, "schema \"" + db.Schema + "\""},
		{"migrate up", 0, "at version 1 of 1"},
		{"migrate up", 0, "at version 1 of 1"},
		{"migrate status", 0, "at version 1 of 1"},
		{"migrate down", 2, "--yes"},
		{"migrate force 7", 2, "7 is not one of 0 to 1"},
		{"migrate force 1", 0, "at version 1 of 1"},
		{"migrate down --yes", 0, "at version 0 of 1"},
		{"migrate print", 0, "CREATE TABLE outbox"},
		{"migrate down --lease=1s", 2, "--yes"},
		{"version --bogus", 2, "--bogus"},
		{"migrate print --bogus", 2, "--bogus"},
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
	for _, want := range []string{"schema", db.Schema, "pending", "1, the oldest ", "parked: dead", "relays", "version 1", "orphan lanes       64 of 64"} {
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
		return s.Pending == 0 && s.Parked["retry"] == 1 && len(s.Relays) == 1 && s.Relays[0].Lanes == 64 && s.SchemaVersion == 1
	})
	if r := s.Relays[0]; r.Name != "first\nrelay" || r.LeaseLeftSeconds <= 0 || r.LeaseLeftSeconds > 15 || s.OrphanLanes != 0 {
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
	if text, code := runProgram(t, []string{"DATABASE_URL=" + db.URL}, "status", "--schema", db.Schema); code != 0 || !strings.Contains(text, " >10000, the oldest ") {
		t.Errorf("exit code %d:\n%s", code, text)
	}
	_, err = db.Exec(testenv.Context(t), "DELETE FROM "+db.Table("outbox")+" WHERE id = (SELECT min(id) FROM "+db.Table("outbox")+")")
	must(t, err)
	if text, code := runProgram(t, []string{"DATABASE_URL=" + db.URL}, "status", "--schema", db.Schema); code != 0 || !strings.Contains(text, " 10000, the") {
		t.Errorf("exit code %d:\n%s", code, text)
	}
}

// The lanes of a relay whose lease has ended belong to nobody, and it is not live.
func TestStatusTellsLiveRelaysFromDeadOnes(t *testing.T) {
	db := testenv.Schema(t)
	sql := strings.NewReplacer("{relay}", db.Table("outbox_relay"), "{lane}", db.Table("outbox_lane"), "{parked}", db.Table("outbox_parked"))
	_, err := db.Exec(testenv.Context(t), sql.Replace(`
		WITH r AS (
			INSERT INTO {relay} (id, name, leased_until) VALUES
				(gen_random_uuid(), 'dead', clock_timestamp() - interval '1 second'),
				(gen_random_uuid(), 'b', clock_timestamp() + interval '1 hour'),
				(gen_random_uuid(), 'a', clock_timestamp() + interval '1 hour')
			RETURNING id, name)
		UPDATE {lane} SET owner = r.id FROM r
		WHERE r.name = CASE WHEN lane < 10 THEN 'a' WHEN lane < 30 THEN 'b' WHEN lane < 60 THEN 'dead' END;
		INSERT INTO {parked} (reason, message_id, routing_key)
		SELECT reason, gen_random_uuid(), 'queue' FROM unnest('{dead, dead, blocked}'::text[]) AS reason`))
	must(t, err)
	environ := []string{"DATABASE_URL=" + db.URL, "TXBOX_SCHEMA=" + db.Schema}
	text, code := runProgram(t, environ, "status")
	want := []string{"parked: scheduled  0", "parked: retry      0", "parked: blocked    1", "parked: dead       2", "relays             2",
		`  "a"              10 lanes, lease ends in `, `  "b"              20 lanes, lease ends in `, "orphan lanes       34 of 64"}
	at := 0
	for _, line := range want { // in this order
		found := strings.Index(text[at:], "\n"+line)
		if code != 0 || found < 0 {
			t.Fatalf("exit code %d, %q is not in, or stands too early:\n%s", code, line, text)
		}
		at += found
	}
}

// Scripts rely on the names.
func TestStatusAsJSONIsOneObjectWithTheseNames(t *testing.T) {
	db := testenv.Schema(t)
	text, code := runProgram(t, []string{"DATABASE_URL=" + db.URL}, "status", "--json", "--schema", db.Schema)
	var object map[string]json.RawMessage
	must(t, json.Unmarshal([]byte(text), &object))
	names := slices.Sorted(maps.Keys(object))
	want := []string{"oldest_pending_age_seconds", "orphan_lanes", "parked", "pending", "pending_is_exact", "relays", "schema", "schema_version"}
	if code != 0 || !slices.Equal(names, want) {
		t.Errorf("exit code %d, got %q, want %q", code, names, want)
	}
	if string(object["relays"]) != "[]" || string(object["orphan_lanes"]) != "64" || string(object["pending_is_exact"]) != "true" {
		t.Error(text)
	}
}

func TestStatusEndsIfTheDatabaseIsNotThere(t *testing.T) {
	text, code := runProgram(t, []string{"DATABASE_URL=postgres://127.0.0.1:1/db"}, "status")
	if code != 1 || !strings.Contains(text, "127.0.0.1") {
		t.Errorf("exit code %d:\n%s", code, text)
	}
}

// A server that accepts and then says nothing is what a paused one looks like.
func TestStatusEndsIfTheDatabaseDoesNotAnswer(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer silent.Close()
	began := time.Now()
	text, code := runProgram(t, []string{"DATABASE_URL=postgres://" + silent.Addr().String() + "/db?sslmode=disable"}, "status", "--timeout=500ms")
	if took := time.Since(began); code != 1 || took > 8*time.Second { // the default is 10 s
		t.Errorf("exit code %d after %s:\n%s", code, took, text)
	}
}
