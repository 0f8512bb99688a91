package inbox

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/internal/testenv"
)

// Plans that PostgreSQL keeps since the tables were empty, as they usually are when a
// consumer starts, serve as well when they are large: each statement reads only what it
// needs, whatever the statistics. What is planned each time is here, too.
func TestStatementsReadOnlyWhatTheyNeed(t *testing.T) {
	t.Parallel()
	ctx, db := testenv.Context(t), testenv.Schema(t)
	inbox, parked, schema := db.Table("inbox"), db.Table("inbox_parked"), db.Schema
	conn, err := db.Acquire(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	exec := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	statements := []struct {
		name, sql, args string
		rows            int // that it wants
	}{
		{"record", recordAllSQL(schema, false), `'c', ARRAY['new'], ARRAY[1], '5000', '40000', '10000', '200'`, 3},
		{"record_alone", recordAllSQL(schema, true), `'c', 'new', 1, '5000', '40000', '10000', '200'`, 3},
		{"record_one", recordSQL(schema), `'c', 'new', 1`, 3},
		{"digests", digestsSQL(schema), `'c', ARRAY['m70000', 'm140000']`, 3},
		{"forget", forgetSQL(schema), `'c', ARRAY['m70000', 'm140000'], 1`, 3},
		{"blocked", blockedSQL(schema, false), `'c', ARRAY['k70000', 'most', 'none']`, 3},
		{"blocked_alone", blockedSQL(schema, true), `'c', 'most'`, 3},
		{"skip", skipBeforeSQL(schema), `'c', 'none', 'none'`, 3},
		{"park", parkSQL(schema), `'c', 'new', 1, 'most', 'blocked', 0, 0, 'e', '', '', ''`, 3},
		{"park_recorded", parkRecordedSQL(schema), `'c', 'new', 1, 'most', 'blocked', 0, 0, 'e', '', '', ''`, 3},
		{"park_ended", parkEndedSQL(schema), `'c', 'm70000', 1, 'most', 'retry', 0, 0, 'e', '', '', ''`, 3},
		{"park_ended_again", parkEndedAgainSQL(schema), `'c', 'm70000', 1, 'most', 'retry', 0, 0, 'e', '', '', '', 70000`, 3},
		{"park_unowned", parkUnownedSQL(schema), `'c', 'm1', 'too_old', 1, 'e', '', '', ''`, 3},
		{"unblock", unblockSQL(schema), `'c', 'most'`, 3},
		{"unblock_all", unblockAllSQL(schema), `'c', 'k5', 20`, 20},
		{"claim", claimSQL(schema), `70000, 60, 0`, 3},
		{"unpark", unparkSQL(schema), `70000, 0`, 3},
		{"settle", settleSQL(schema), `70000, 0, 'retry', 1, 'e', 1`, 3},
		{"prune", pruneSQL(schema, true), `'c', 'm5', 1, 100, 'c'`, 100},
	}
	for _, s := range statements {
		exec("PREPARE " + s.name + " AS " + s.sql)
		for range 8 { // after five it may keep a plan
			exec("BEGIN; EXECUTE " + s.name + "(" + s.args + "); ROLLBACK")
		}
	}
	for _, sql := range []string{
		`ALTER TABLE ` + inbox + ` SET (autovacuum_enabled = false)`, // which would help
		`ALTER TABLE ` + parked + ` SET (autovacuum_enabled = false)`,
		`INSERT INTO ` + inbox + ` (consumer, message_id, digest) SELECT c, 'm' || n, n FROM generate_series(1, 150000) AS n, unnest(ARRAY['b', 'c']) AS c`,
		`INSERT INTO ` + parked + ` (consumer, message_id, key, reason, due_at)
			SELECT 'c', 'm' || n, CASE WHEN n % 2 = 0 THEN 'k' || n ELSE 'most' END, CASE WHEN n % 2 = 0 THEN 'retry' ELSE 'blocked' END,
				CASE WHEN n % 2 = 0 THEN now() - interval '1 hour' END FROM generate_series(1, 100000) AS n`,
	} {
		if _, err := db.Exec(ctx, sql); err != nil {
			t.Fatal(err)
		}
	}
	due := statements[0]
	due.name, due.sql, due.args, due.rows = "due", dueSQL(schema), "", duePage // planned each time
	statements = append(statements, due)
	check := func(when string) {
		for _, s := range statements {
			tx, err := conn.Begin(ctx)
			if err != nil {
				t.Fatal(err)
			}
			var text []byte
			explained, mode := fmt.Sprintf("EXECUTE %s(%s)", s.name, s.args), []any{pgx.QueryExecModeSimpleProtocol}
			if s.args == "" {
				explained, mode = s.sql, []any{pgx.QueryExecModeCacheDescribe, "c", duePage}
			}
			if err := tx.QueryRow(ctx, "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) "+explained, mode...).Scan(&text); err != nil {
				t.Fatalf("%s: %v", s.name, err)
			}
			if err := tx.Rollback(ctx); err != nil {
				t.Fatal(err)
			}
			var plans []struct {
				Plan struct {
					Hit  int `json:"Shared Hit Blocks"`
					Read int `json:"Shared Read Blocks"`
				}
			}
			if err := json.Unmarshal(text, &plans); err != nil {
				t.Fatal(err)
			}
			if pages := plans[0].Plan.Hit + plans[0].Plan.Read; pages > 500+20*s.rows || strings.Contains(string(text), "Seq Scan") {
				t.Errorf("%s, %s: %d pages, or all of a table", s.name, when, pages)
				t.Logf("%s", text)
			}
		}
	}
	check("with plans for empty tables")
	for _, table := range []string{inbox, parked} {
		if _, err := db.Exec(ctx, "ANALYZE "+table); err != nil {
			t.Fatal(err)
		}
	}
	check("analyzed")
}
