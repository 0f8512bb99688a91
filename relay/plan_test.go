package relay

import (
	"context"
	"encoding/json"
	"math"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/internal/testenv"
)

// A statement that reads more than a few pages for each row that it wants has the
// wrong plan. The tables were analyzed while they were empty, as they usually are.
func TestStatementsReadOnlyWhatTheyNeed(t *testing.T) {
	t.Parallel()
	db := testenv.Schema(t)
	ctx := testenv.Context(t)
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	outbox, parked := db.Table("outbox"), db.Table("outbox_parked")
	must(db.Exec(ctx, `ANALYZE `+outbox))
	must(db.Exec(ctx, `ANALYZE `+parked))
	const rows = 1_000_000
	must(db.Exec(ctx, `INSERT INTO `+outbox+` (message_id, key, routing_key)
		SELECT gen_random_uuid(), i % 10000, 'q' FROM generate_series(1, $1::int) AS i`, rows))
	must(db.Exec(ctx, `INSERT INTO `+parked+` (message_id, key, routing_key, reason, due_at)
		SELECT gen_random_uuid(), NULL, 'q', 'scheduled', now() + interval '1 week' FROM generate_series(1, $1::int) AS i`, rows/5))
	must(db.Exec(ctx, `INSERT INTO `+parked+` (message_id, key, routing_key, reason, due_at)
		SELECT gen_random_uuid(), i, 'q', 'retry', now() FROM generate_series(1, 100) AS i`))

	const owner = "6b8ce5a4-6c1c-4b51-a1a5-0f10e3fd4a3f"
	sql := newStatements(db.Schema)
	must(db.Exec(ctx, sql.lease, owner, "test", time.Minute, true))
	all := make([]int16, lanes)
	epochs := make([]int64, lanes)
	for i := range all {
		all[i], epochs[i] = int16(i), 1
	}
	some := func(n int, table string) (laneIDs []int16, laneEpochs, ids []int64, messageIDs []uuid.UUID) {
		found, err := db.Query(ctx, `SELECT lane, id, message_id FROM `+table+` ORDER BY due_at, id LIMIT $1`, n)
		if table == outbox {
			found, err = db.Query(ctx, `SELECT lane, id, message_id FROM `+table+` ORDER BY id LIMIT $1`, n)
		}
		must(nil, err)
		var lane int16
		var id int64
		var messageID uuid.UUID
		_, err = pgx.ForEachRow(found, []any{&lane, &id, &messageID}, func() error {
			laneIDs, laneEpochs = append(laneIDs, lane), append(laneEpochs, 1)
			ids, messageIDs = append(ids, id), append(messageIDs, messageID)
			return nil
		})
		must(nil, err)
		return laneIDs, laneEpochs, ids, messageIDs
	}
	verdicts := func(n int, table string) []any {
		l, e, ids, messageIDs := some(n, table)
		reasons, spent, delays, errs := make([]string, len(l)), make([]int32, len(l)), make([]float64, len(l)), make([]string, len(l))
		for i := range reasons {
			reasons[i] = "retry"
		}
		return []any{owner, l, e, ids, messageIDs, reasons, spent, delays, errs}
	}
	_, _, ids, messageIDs := some(settleRows, outbox)
	lows, highs := []int64{}, []int64{}
	for i := range int64(100) {
		lows, highs = append(lows, 1000*i), append(highs, 1000*i+5)
	}

	var blockedLanes []int16
	var blockedKeys []string
	must(nil, db.QueryRow(ctx, `SELECT array_agg(lane), array_agg(key) FROM `+parked+` WHERE key IS NOT NULL`).Scan(&blockedLanes, &blockedKeys))

	for _, c := range []struct {
		name string
		rows int // that it wants
		sql  string
		args []any
	}{
		{"page at the start", pageRows, sql.page, []any{pageBytes, pageRows, int64(-1), int64(1), int64(math.MaxInt64), []string(nil)}},
		{"page in the middle", pageRows, sql.page, []any{pageBytes, pageRows, int64(-1), int64(rows / 2), int64(math.MaxInt64), []string(nil)}},
		{"page at the end", 10, sql.page, []any{pageBytes, pageRows, int64(-1), int64(rows - 9), int64(rows), []string(nil)}},
		{"gaps", 600, sql.pages, []any{pageBytes, pageRows, int64(-1), lows, highs, []string(nil)}},
		{"what was passed over", pageRows, sql.page, []any{pageBytes, pageRows, int64(-1), int64(rows / 2), int64(math.MaxInt64), []string{"77"}}},
		{"due", 100, sql.due, []any{pageBytes, duePerLane, int64(-1), []int64{}}},
		{"blocked keys", 100, sql.blocked, []any{all, "", 15}},
		{"heads", 100, sql.heads, []any{pageBytes, 1, int64(-1), blockedLanes, blockedKeys}},
		{"delete", settleRows, sql.delete, []any{ids, messageIDs}},
		{"delete parked", settleRows, sql.deleteParked, []any{ids, messageIDs}},
		{"park", settleRows, sql.park, verdicts(settleRows, outbox)},
		{"park again", 100, sql.repark, append(verdicts(100, parked), time.Hour.Seconds())},
		{"lease", lanes, sql.lease, []any{owner, "test", time.Minute, true}},
		{"release", lanes, sql.release, []any{owner, all, true}},
	} {
		if pages := pagesRead(t, db, c.sql, c.args); pages > 500+20*c.rows {
			t.Errorf("%s: read %d pages for %d rows", c.name, pages, c.rows)
		}
	}

	// The same rows, dead, while somebody's snapshot keeps them.
	reader, err := db.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	must(nil, err)
	defer reader.Rollback(ctx)
	must(reader.Exec(ctx, `SELECT count(*) FROM `+outbox))
	must(db.Exec(ctx, `DELETE FROM `+outbox))
	page := func(after int64) int {
		return pagesRead(t, db, sql.page, []any{pageBytes, pageRows, int64(-1), after + 1, int64(math.MaxInt64), []string(nil)})
	}
	if pages := page(2 * rows); pages > 500 {
		t.Errorf("above the floor: read %d pages for nothing", pages)
	}
	if pages := page(0); pages < rows/100 {
		t.Errorf("from the first id: read only %d pages, so this test shows nothing", pages)
	}
}

// pagesRead returns how many pages of 8 KiB a statement touches. It is rolled
// back.
func pagesRead(t *testing.T, db *testenv.DB, sql string, args []any) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(testenv.Context(t), time.Minute)
	defer cancel()
	tx, err := db.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(ctx)
	var text []byte
	if err := tx.QueryRow(ctx, "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) "+sql, append([]any{unplanned}, args...)...).Scan(&text); err != nil {
		t.Fatalf("%s: %v", sql, err)
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
	return plans[0].Plan.Hit + plans[0].Plan.Read
}
