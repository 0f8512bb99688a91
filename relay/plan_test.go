package relay

import (
	"context"
	"encoding/json"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/internal/testenv"
)

// A statement that reads more than a few pages for each row that it wants has the
// wrong plan: with the statistics of empty tables, which is what PostgreSQL usually
// has of an outbox, and with those of tables in which one key has most messages.
func TestStatementsReadOnlyWhatTheyNeed(t *testing.T) {
	t.Parallel()
	p := newPlanner(t)
	p.exec(`ANALYZE ` + p.outbox)
	p.exec(`ANALYZE ` + p.parked)
	p.exec(`INSERT INTO `+p.outbox+` (message_id, key, routing_key)
		SELECT gen_random_uuid(), i % 10000, 'q' FROM generate_series(1, $1::int) AS i`, planRows)
	p.exec(`INSERT INTO `+p.parked+` (message_id, routing_key, reason, due_at)
		SELECT gen_random_uuid(), 'q', 'scheduled', now() + interval '1 week' FROM generate_series(1, $1::int) AS i`, planRows/5)
	p.exec(`INSERT INTO ` + p.parked + ` (message_id, key, routing_key, reason, due_at)
		SELECT gen_random_uuid(), i, 'q', 'retry', now() FROM generate_series(1, 100) AS i`)
	p.exec(`INSERT INTO `+p.parked+` (message_id, key, routing_key, reason)
		SELECT gen_random_uuid(), 'most', 'q', 'blocked' FROM generate_series(1, $1::int) AS i`, planRows/10)
	p.exec(p.sql.lease, planOwner, "test", time.Minute, true)
	p.checkAll("analyzed while empty")
	p.exec(`ANALYZE ` + p.outbox)
	p.exec(`ANALYZE ` + p.parked)
	p.checkAll("analyzed")
	defer p.holdSnapshot()()
	p.exec(`DELETE FROM ` + p.parked + ` WHERE key IS DISTINCT FROM 'most'`)
	p.exec(`ANALYZE ` + p.parked)
	p.checkAll("analyzed with one blocked key")
}

// Rows that are dead, while somebody's snapshot keeps them, cost nothing above the
// floor.
func TestRowsThatASnapshotKeepsCostNothing(t *testing.T) {
	t.Parallel()
	p := newPlanner(t)
	p.exec(`INSERT INTO `+p.outbox+` (message_id, routing_key) SELECT gen_random_uuid(), 'q' FROM generate_series(1, $1::int) AS i`, planRows/2)
	defer p.holdSnapshot()()
	p.exec(`DELETE FROM ` + p.outbox)
	page := func(after int64) int {
		return p.pagesRead(p.sql.page, []any{pageBytes, pageRows, int64(-1), after + 1, []string(nil), pageRows, false})
	}
	if pages := page(planRows); pages > 500 {
		t.Errorf("above the floor: read %d pages for nothing", pages)
	}
	var gaps []int64
	for i := range int64(lateSpans) {
		gaps = append(gaps, 1+i*planRows/2/lateSpans)
	}
	args := []any{pageBytes, pageRows, int64(-1), int64(planRows), []string(nil), pageRows, false, gaps, gaps}
	if pages := p.pagesRead(p.sql.pages, args); pages > 500+20*lateSpans {
		t.Errorf("in %d gaps: read %d pages for nothing", lateSpans, pages)
	}
	if pages := page(0); pages < planRows/200 {
		t.Errorf("from the first id: read only %d pages, so this test shows nothing", pages)
	}
}

// Parked messages that were sent are passed over by a look now and then, not by each.
func TestParkedRowsThatASnapshotKeepsCostLittle(t *testing.T) {
	t.Parallel()
	p := newPlanner(t)
	p.exec(`INSERT INTO `+p.parked+` (message_id, key, routing_key, reason, due_at)
		SELECT gen_random_uuid(), i % 10000, 'q', 'retry', now() - interval '1 hour' FROM generate_series(1, $1::int) AS i`, planRows/5)
	p.exec(`INSERT INTO ` + p.outbox + ` (message_id, key, routing_key) SELECT gen_random_uuid(), i + 10000, 'q' FROM generate_series(1, 100) AS i`)
	defer p.holdSnapshot()()
	p.exec(`DELETE FROM ` + p.parked)
	for _, c := range []struct {
		name          string
		sql           string
		seldom, often []any
	}{
		{"due", p.sql.due, []any{pageBytes, duePerLane, int64(-1), []int64{}, 0.0, nil, nil, nil, nil},
			[]any{pageBytes, duePerLane, int64(-1), []int64{}, 0.0, nil, nil, dueLately.Seconds(), nil}},
		{"look", p.sql.drawn, []any{true}, []any{false}},
		{"page", p.sql.page, []any{pageBytes, pageRows, int64(-1), int64(1), []string(nil), pageRows, false},
			[]any{pageBytes, pageRows, int64(-1), int64(1), []string(nil), pageRows, true}},
	} {
		seldom, often := p.pagesRead(c.sql, c.seldom), p.pagesRead(c.sql, c.often)
		if often > 500+20*100 || seldom < 10*often {
			t.Errorf("%s: reads %d pages instead of %d", c.name, often, seldom)
		}
	}
}

// Messages that wait for next week are not looked at.
func TestMillionScheduledMessagesCostNothing(t *testing.T) {
	t.Parallel()
	p := newPlanner(t)
	p.exec(`INSERT INTO `+p.parked+` (message_id, routing_key, reason, due_at)
		SELECT gen_random_uuid(), 'q', 'scheduled', now() + interval '1 week' + i * interval '1 second' FROM generate_series(1, $1::int) AS i`, planRows)
	for _, when := range []string{"never analyzed", "analyzed"} {
		for _, c := range []struct {
			name string
			sql  string
			args []any
		}{
			{"due", p.sql.due, []any{pageBytes, duePerLane, int64(-1), []int64{}, 0.0, nil, nil, nil, nil}},
			{"look", p.sql.drawn, []any{true}},
			{"page", p.sql.page, []any{pageBytes, pageRows, int64(-1), int64(1), []string(nil), pageRows, false}},
		} {
			if pages := p.pagesRead(c.sql, c.args); pages > 5*lanes {
				t.Errorf("%s, %s: read %d pages for nothing", c.name, when, pages)
			}
		}
		p.exec(`ANALYZE ` + p.parked)
	}
}

const (
	planRows  = 1_000_000
	planOwner = "6b8ce5a4-6c1c-4b51-a1a5-0f10e3fd4a3f"
)

// planner asks how PostgreSQL executes the statements of a schema of its own.
type planner struct {
	*testing.T
	*testenv.DB
	sql            statements
	outbox, parked string
}

func newPlanner(t *testing.T) *planner {
	db := testenv.Schema(t)
	return &planner{T: t, DB: db, sql: newStatements(db.Schema), outbox: db.Table("outbox"), parked: db.Table("outbox_parked")}
}

func (p *planner) must(err error) {
	p.Helper()
	if err != nil {
		p.Fatal(err)
	}
}

func (p *planner) exec(sql string, args ...any) {
	p.Helper()
	_, err := p.Exec(testenv.Context(p), sql, args...)
	p.must(err)
}

// holdSnapshot keeps what is deleted from now on until the function that it returns is
// called.
func (p *planner) holdSnapshot() (release func()) {
	p.Helper()
	reader, err := p.BeginTx(testenv.Context(p), pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	p.must(err)
	_, err = reader.Exec(testenv.Context(p), `SELECT count(*) FROM `+p.outbox)
	p.must(err)
	return func() { reader.Rollback(testenv.Context(p)) }
}

func (p *planner) checkAll(when string) {
	p.Helper()
	all := make([]int16, lanes)
	for i := range all {
		all[i] = int16(i)
	}
	_, ids, messageIDs := p.first(settleRows, p.outbox, "id")
	lows, highs := []int64{}, []int64{}
	for i := range int64(100) {
		lows, highs = append(lows, 1000*i), append(highs, 1000*i+5)
	}
	var blockedLanes []int16
	var blockedKeys []string
	p.must(p.QueryRow(testenv.Context(p), `SELECT array_agg(lane), array_agg(key)
		FROM (SELECT DISTINCT lane, key FROM `+p.parked+` WHERE key IS NOT NULL) AS k`).Scan(&blockedLanes, &blockedKeys))
	const everything, last = int64(-1), int64(math.MaxInt64)
	noKeys := []string(nil)
	for _, c := range []struct {
		name string
		rows int // that it wants
		sql  string
		args []any
	}{
		{"page at the start", pageRows, p.sql.page, []any{pageBytes, pageRows, everything, int64(1), noKeys, pageRows, false}},
		{"page in the middle", pageRows, p.sql.page, []any{pageBytes, pageRows, everything, int64(planRows / 2), noKeys, pageRows, false}},
		{"page at the end", 10, p.sql.page, []any{pageBytes, pageRows, everything, int64(planRows - 9), noKeys, pageRows, true}},
		{"page of foreign lanes", 0, p.sql.page, []any{pageBytes, pageRows, int64(0), int64(planRows / 2), noKeys, pageRows, false}},
		{"gaps", 600, p.sql.pages, []any{pageBytes, pageRows, everything, int64(planRows - 9), noKeys, pageRows, false, lows, highs}},
		{"scan", pageRows, p.sql.pages, []any{pageBytes, pageRows, everything, last, noKeys, pageRows, false, []int64{1}, []int64{planRows}}},
		{"what was passed over", pageRows, p.sql.pages, []any{pageBytes, pageRows, everything, last, []string{"77"}, lineRows, true, []int64{planRows / 2}, []int64{planRows}}},
		{"due", 100, p.sql.due, []any{pageBytes, duePerLane, everything, []int64{}, 0.0, nil, nil, nil, nil}},
		{"blocked keys", 101, p.sql.blocked, []any{all, "", 15}},
		{"heads", 101, p.sql.heads, []any{pageBytes, 1, everything, blockedLanes, blockedKeys}},
		{"delete", settleRows, p.sql.delete, []any{ids, messageIDs, lockWait}},
		{"delete parked", settleRows, p.sql.deleteParked, []any{ids, messageIDs, lockWait}},
		{"park", settleRows, p.sql.park, p.verdicts(settleRows, p.outbox, "id")},
		{"park again", 100, p.sql.repark, append(p.verdicts(100, p.parked, "due_at, id"), time.Hour.Seconds())},
		{"lease", lanes, p.sql.lease, []any{planOwner, "test", time.Minute, true}},
		{"release", lanes, p.sql.release, []any{planOwner, all, true}},
	} {
		if pages := p.pagesRead(c.sql, c.args); pages > 500+20*c.rows {
			p.Errorf("%s, %s: read %d pages for %d rows", c.name, when, pages, c.rows)
		}
	}
}

// first returns the first n rows of a table.
func (p *planner) first(n int, table, order string) (laneIDs []int16, ids []int64, messageIDs []uuid.UUID) {
	p.Helper()
	rows, err := p.Query(testenv.Context(p), `SELECT lane, id, message_id FROM `+table+` ORDER BY `+order+` LIMIT $1`, n)
	p.must(err)
	var lane int16
	var id int64
	var messageID uuid.UUID
	_, err = pgx.ForEachRow(rows, []any{&lane, &id, &messageID}, func() error {
		laneIDs, ids, messageIDs = append(laneIDs, lane), append(ids, id), append(messageIDs, messageID)
		return nil
	})
	p.must(err)
	return laneIDs, ids, messageIDs
}

// verdicts returns arguments that have the first n rows of a table retried.
func (p *planner) verdicts(n int, table, order string) []any {
	p.Helper()
	l, ids, messageIDs := p.first(n, table, order)
	epochs, reasons, spent, delays, errs := make([]int64, len(l)), make([]string, len(l)), make([]int32, len(l)), make([]float64, len(l)), make([]string, len(l))
	for i := range l {
		epochs[i], reasons[i] = 1, "retry"
	}
	return []any{planOwner, l, epochs, ids, messageIDs, reasons, spent, delays, errs, lockWait}
}

// pagesRead returns how many pages of 8 KiB a statement touches, and fails the test if
// PostgreSQL compiles it. It is rolled back.
func (p *planner) pagesRead(sql string, args []any) int {
	p.Helper()
	ctx, cancel := context.WithTimeout(testenv.Context(p), time.Minute)
	defer cancel()
	options := pgx.TxOptions{}
	if strings.HasPrefix(sql, "WITH page") && sql != p.sql.page {
		options.BeginQuery = beginSQL
	}
	tx, err := p.BeginTx(ctx, options)
	p.must(err)
	defer tx.Rollback(ctx)
	var text []byte
	if err := tx.QueryRow(ctx, "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) "+sql, append([]any{unplanned}, args...)...).Scan(&text); err != nil {
		p.Fatalf("%s: %v", sql, err)
	}
	var plans []struct {
		Plan struct {
			Hit  int `json:"Shared Hit Blocks"`
			Read int `json:"Shared Read Blocks"`
		}
		JIT any
	}
	p.must(json.Unmarshal(text, &plans))
	if plans[0].JIT != nil {
		p.Errorf("compiled: %s", sql)
	}
	return plans[0].Plan.Hit + plans[0].Plan.Read
}
