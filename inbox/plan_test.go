package inbox

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/internal/testenv"
)

// planned tells when a statement is.
type planned int

const (
	always planned = iota // whenever it runs
	once                  // for each connection, until the table is analyzed
	// onceOfParked read all of inbox_parked, one page, if that is what was there when they
	// were planned, until autovacuum analyzes it: once a minute, after 50 more rows.
	onceOfParked
)

const asBefore = "as planned before"

// plannedStatement is one of the package, with arguments.
type plannedStatement struct {
	name, sql, args string
	rows            int // that it wants
	plan            planned
}

func plannedStatements(schema string) []plannedStatement {
	return []plannedStatement{
		{"record", recordAllSQL(schema, false), `'c', ARRAY['new'], ARRAY[1], '5000', '40000', '10000', '200'`, 3, once},
		{"record_alone", recordAllSQL(schema, true), `'c', 'new', 1, '5000', '40000', '10000', '200'`, 3, once},
		{"record_one", recordSQL(schema), `'c', 'new', 1`, 3, once},
		{"digests", digestsSQL(schema), `'c', ARRAY['m70000', 'm140000']`, 3, once},
		{"forget", forgetSQL(schema), `'c', ARRAY['m70000', 'm140000'], 1`, 3, always},
		{"blocked", blockedSQL(schema, false), `'c', ARRAY['k70000', 'most', 'none']`, 3, onceOfParked},
		{"blocked_alone", blockedSQL(schema, true), `'c', 'most'`, 3, onceOfParked},
		{"skip", skipBeforeSQL(schema), `'c', 'none', 'none'`, 3, always},
		{"park", parkSQL(schema), `'c', 'new', 1, 'most', 'blocked', 0, 0, 'e', '', '', ''`, 3, always},
		{"park_recorded", parkRecordedSQL(schema), `'c', 'new', 1, 'most', 'blocked', 0, 0, 'e', '', '', ''`, 3, once},
		{"park_ended", parkEndedSQL(schema), `'c', 'm70000', 1, 'most', 'retry', 0, 0, 'e', '', '', ''`, 3, always},
		{"park_ended_again", parkEndedAgainSQL(schema), `'c', 'm70000', 1, 'most', 'retry', 0, 0, 'e', '', '', '', 70000`, 3, always},
		{"park_unowned", parkUnownedSQL(schema), `'c', 'm1', 'too_old', 1, 'e', '', '', ''`, 3, always},
		{"unblock", unblockSQL(schema), `'c', 'most'`, 3, always},
		{"unblock_all", unblockAllSQL(schema), `'c', 'k5', 20`, 20, always},
		{"claim", claimSQL(schema), `70000, 60, 0`, 3, always},
		{"unpark", unparkSQL(schema), `70000, 0`, 3, onceOfParked},
		{"settle", settleSQL(schema), `70000, 0, 'retry', 1, 'e', 1`, 3, always},
		{"due", dueSQL(schema), `'c', 100`, duePage, always},
		{"prune", pruneSQL(schema, true), `'c', 'm5', 1, 100, 'c'`, 100, always},
	}
}

// Plans that PostgreSQL keeps since the tables were empty or small, as they usually are when
// a consumer starts, serve as well when they are large: each statement reads only what it
// needs, whatever the statistics. What is planned each time is here, too.
func TestStatementsReadOnlyWhatTheyNeed(t *testing.T) {
	t.Parallel()
	for _, rows := range []int{0, 20} {
		t.Run(fmt.Sprint(rows), func(t *testing.T) {
			t.Parallel()
			readOnlyWhatTheyNeed(t, rows)
		})
	}
}

// readOnlyWhatTheyNeed plans for tables of few rows, analyzed if there are any.
func readOnlyWhatTheyNeed(t *testing.T, few int) {
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
	statements := plannedStatements(schema)
	fill := func(from, to int) {
		t.Helper()
		for _, sql := range []string{
			`INSERT INTO ` + inbox + ` (consumer, message_id, digest) SELECT c, 'm' || n, n FROM generate_series($1::int, $2::int) AS n, unnest(ARRAY['b', 'c']) AS c`,
			`INSERT INTO ` + parked + ` (consumer, message_id, key, reason, due_at)
			SELECT 'c', 'm' || n, CASE WHEN n % 2 = 0 THEN 'k' || n ELSE 'most' END, CASE WHEN n % 2 = 0 THEN 'retry' ELSE 'blocked' END,
				CASE WHEN n % 2 = 0 THEN now() - interval '1 hour' END FROM generate_series($1::int, least($2, 100000)) AS n`,
		} {
			if _, err := db.Exec(ctx, sql, from, to); err != nil {
				t.Fatal(err)
			}
		}
	}
	analyze := func() {
		t.Helper()
		exec("ANALYZE " + inbox + ", " + parked)
	}
	for _, table := range []string{inbox, parked} {
		exec("ALTER TABLE " + table + " SET (autovacuum_enabled = false)") // which would help
	}
	if few > 0 {
		fill(1, few)
		analyze()
	}
	prepare := func(name, sql string) { exec("PREPARE " + name + " AS " + sql) }
	for _, s := range statements {
		prepare(s.name, s.sql)
		for range 8 { // after five it may keep a plan
			exec("BEGIN; EXECUTE " + s.name + "(" + s.args + "); ROLLBACK")
		}
	}
	fill(few+1, 150_000)
	check := func(when string) {
		for _, s := range statements {
			switch {
			case s.plan == always:
				exec("DEALLOCATE " + s.name)
				prepare(s.name, s.sql)
			case s.plan == onceOfParked && few > 0 && when == asBefore:
				continue
			}
			if pages, text := explained(t, conn, s); pages > 500+20*s.rows || strings.Contains(text, "Seq Scan") {
				t.Errorf("%s, %s: %d pages, or all of a table", s.name, when, pages)
				t.Log(text)
			}
		}
	}
	check(asBefore)
	analyze()
	check("analyzed")
}

// explained executes a prepared statement, rolls back, and tells how.
func explained(t *testing.T, conn *pgxpool.Conn, s plannedStatement) (pages int, text string) {
	t.Helper()
	ctx := testenv.Context(t)
	tx, err := conn.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	explain := "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE " + s.name + "(" + s.args + ")"
	if err := tx.QueryRow(ctx, explain, pgx.QueryExecModeSimpleProtocol).Scan(&text); err != nil {
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
	if err := json.Unmarshal([]byte(text), &plans); err != nil {
		t.Fatal(err)
	}
	return plans[0].Plan.Hit + plans[0].Plan.Read, text
}
