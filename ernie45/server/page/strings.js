// Every word of the page, in both languages. `{name}` is filled in by `t`.

export const strings = {
  en: {
    // the page
    language_other: "中文",
    language_switch: "Switch to Chinese",
    theme_dark: "Use dark colours",
    theme_light: "Use light colours",
    menu_open: "Show conversations",
    settings_open: "Settings",
    close: "Close",
    cancel: "Cancel",
    model: "Model",
    jump_down: "Jump to the latest",

    // the server's state
    server_connecting: "Connecting …",
    server_ready: "Ready",
    server_loading: "The model is loading",
    server_restarting: "The engine is restarting",
    server_busy: "Not ready: {state}",
    server_unreachable: "The server does not answer",
    server_locked: "A key is needed",
    server_wait: "You can write already. Sending works as soon as the model is ready.",
    server_next: "Next try in {seconds} s",
    server_try: "Try now",

    // empty conversation
    empty_title: "What would you like to ask?",
    empty_note: "The model runs on this server. Conversations stay in this browser.",
    example_explain: "Explain in three sentences why the sky is blue.",
    example_table: "Compare tea and coffee in a small table.",
    example_code: "Write a Python function that reverses the words of a sentence.",
    example_translate: "Translate into Chinese: “A good beginning is half the battle.”",

    // writing
    composer_label: "Message",
    composer_hint: "Write a message …",
    send: "Send",
    stop: "Stop",
    think: "Think",
    think_on: "The model thinks before it answers",
    think_off: "The model answers at once",
    keys_hint: "Enter sends · Shift+Enter breaks the line · Esc stops",
    invalid_settings: "A setting is out of range.",
    invalid_open: "Show it",

    // turns
    you: "You",
    assistant: "Answer",
    system_prompt: "System prompt",
    edit: "Edit",
    edit_note: "Sending replaces everything below.",
    copy: "Copy",
    copied: "Copied",
    copy_failed: "Copying failed",
    regenerate: "Answer again",
    thinking: "Thinking … {seconds} s",
    thought: "Thought for {seconds} s",
    thought_untimed: "Thoughts",
    thought_tokens: "{n} tokens",
    waiting: "Waiting for the first token … {seconds} s",
    tool_call: "Call of the tool {name}",
    stopped: "Stopped",
    cut_off: "Cut off: the limit of tokens is reached.",
    finish_other: "Ended by the server: {reason}.",
    code_copy: "Copy code",

    // figures
    live_first: "{seconds} s to first token",
    live_rate: "≈ {rate} tok/s",
    live_note: "measured in this page, one token counted per event",
    usage_in: "in {n}",
    usage_cached: "({n} cached)",
    usage_out: "out {n}",
    usage_thinking: "({n} thinking)",
    usage_rate: "{rate} tok/s",
    usage_note: "Tokens as counted by the server, times as measured in this page. The rate leaves out the first token.",

    // errors
    error_connection: "The server could not be reached",
    error_connection_note: "The connection failed before or during the answer ({message}).",
    error_broken: "The answer broke off",
    error_incomplete: "The stream ended before the answer was complete.",
    error_key: "The server refused the key",
    error_busy: "The server is busy",
    error_refused: "The server refused the request",
    error_server: "The server failed",
    error_details: "Details",
    error_wait: "You can try again in {seconds} s",
    retry: "Try again",
    storage_failed: "The browser does not store this conversation ({message}). It is lost when the page is closed.",

    // conversations
    conversations: "Conversations",
    conversation_new: "New conversation",
    conversation_delete: "Delete “{title}”",
    conversation_none: "Nothing here yet.",
    conversation_clear: "Delete all",
    clear_title: "Delete all conversations?",
    clear_note: "They are kept in this browser only; there is no way back.",
    clear_confirm: "Delete all",
    untitled: "New conversation",

    // the key
    key_title: "Key of this server",
    key_missing: "This server asks for its key. It was printed when the server started.",
    key_refused: "The server refused this key. Check it, or look at what the server printed when it started.",
    key_change: "Change the key",
    key_label: "Key",
    key_note: "Kept until this tab is closed, and sent to this server only.",
    key_use: "Use this key",

    // settings
    settings: "Settings",
    settings_system: "System prompt",
    settings_system_hint: "How the model should behave in this conversation",
    settings_thinking: "Thinking",
    settings_sampling: "Sampling",
    settings_server: "Server",
    settings_context: "Context: {n} tokens",
    settings_unset: "server default",
    settings_reset: "Reset all",
    settings_note: "Empty fields are not sent; the server then uses its own defaults.",
    range: "{low} to {high}",
    range_above: "above {low}, to {high}",
    range_whole: "whole number, {low} to {high}",
    range_whole_open: "whole number from {low}",
    range_stop: "one per line, at most {n}; \\n stands for a line break",
    bad_number: "“{value}” is not a number: {range}",
    bad_whole: "{value} is not a whole number: {range}",
    bad_range: "{value} is out of range: {range}",
    bad_stop: "{count} stop strings are too many: at most {n}",
    p_temperature: "Temperature",
    p_top_p: "Top p",
    p_top_k: "Top k",
    p_min_p: "Min p",
    p_max_tokens: "Longest answer (tokens)",
    p_repetition_penalty: "Repetition penalty",
    p_presence_penalty: "Presence penalty",
    p_frequency_penalty: "Frequency penalty",
    p_seed: "Seed",
    p_stop: "Stop strings",
    p_reasoning_max_tokens: "Longest thought (tokens)",

    // for screen readers
    said_started: "The model answers.",
    said_done: "The answer is complete.",
    said_stopped: "The answer was stopped.",
    said_failed: "The answer failed: {message}",
  },
  zh: {
    // the page
    language_other: "EN",
    language_switch: "切换到英文",
    theme_dark: "使用深色界面",
    theme_light: "使用浅色界面",
    menu_open: "显示对话列表",
    settings_open: "设置",
    close: "关闭",
    cancel: "取消",
    model: "模型",
    jump_down: "跳到最新内容",

    // the server's state
    server_connecting: "正在连接……",
    server_ready: "就绪",
    server_loading: "模型正在加载",
    server_restarting: "引擎正在重启",
    server_busy: "尚未就绪：{state}",
    server_unreachable: "服务器没有响应",
    server_locked: "需要密钥",
    server_wait: "现在就可以输入，模型就绪后即可发送。",
    server_next: "{seconds} 秒后重试",
    server_try: "立即重试",

    // empty conversation
    empty_title: "想问点什么？",
    empty_note: "模型运行在此服务器上，对话只保存在本浏览器中。",
    example_explain: "用三句话解释天空为什么是蓝色的。",
    example_table: "用一个小表格比较茶和咖啡。",
    example_code: "写一个 Python 函数，把句子中的单词顺序颠倒。",
    example_translate: "翻译成英文：“好的开始是成功的一半。”",

    // writing
    composer_label: "消息",
    composer_hint: "输入消息……",
    send: "发送",
    stop: "停止",
    think: "思考",
    think_on: "模型先思考再回答",
    think_off: "模型直接回答",
    keys_hint: "Enter 发送 · Shift+Enter 换行 · Esc 停止",
    invalid_settings: "有设置超出范围。",
    invalid_open: "查看",

    // turns
    you: "你",
    assistant: "回答",
    system_prompt: "系统提示词",
    edit: "编辑",
    edit_note: "发送后将替换下方所有内容。",
    copy: "复制",
    copied: "已复制",
    copy_failed: "复制失败",
    regenerate: "重新回答",
    thinking: "思考中…… {seconds} 秒",
    thought: "思考了 {seconds} 秒",
    thought_untimed: "思考过程",
    thought_tokens: "{n} 个词元",
    waiting: "等待第一个词元…… {seconds} 秒",
    tool_call: "调用工具 {name}",
    stopped: "已停止",
    cut_off: "已截断：达到词元数上限。",
    finish_other: "服务器结束了回答：{reason}。",
    code_copy: "复制代码",

    // figures
    live_first: "首个词元 {seconds} 秒",
    live_rate: "≈ {rate} 词元/秒",
    live_note: "由本页面测量，每个事件计为一个词元",
    usage_in: "输入 {n}",
    usage_cached: "(缓存 {n})",
    usage_out: "输出 {n}",
    usage_thinking: "(思考 {n})",
    usage_rate: "{rate} 词元/秒",
    usage_note: "词元数由服务器统计，时间由本页面测量；速度不计第一个词元。",

    // errors
    error_connection: "无法连接服务器",
    error_connection_note: "连接在回答之前或过程中失败（{message}）。",
    error_broken: "回答中断",
    error_incomplete: "数据流在回答完成之前结束。",
    error_key: "服务器拒绝了密钥",
    error_busy: "服务器繁忙",
    error_refused: "服务器拒绝了请求",
    error_server: "服务器出错",
    error_details: "详情",
    error_wait: "{seconds} 秒后可重试",
    retry: "重试",
    storage_failed: "浏览器无法保存此对话（{message}），关闭页面后将丢失。",

    // conversations
    conversations: "对话",
    conversation_new: "新对话",
    conversation_delete: "删除“{title}”",
    conversation_none: "还没有对话。",
    conversation_clear: "全部删除",
    clear_title: "删除所有对话？",
    clear_note: "对话只保存在本浏览器中，删除后无法恢复。",
    clear_confirm: "全部删除",
    untitled: "新对话",

    // the key
    key_title: "服务器密钥",
    key_missing: "此服务器需要密钥，启动时已打印在终端中。",
    key_refused: "服务器拒绝了此密钥。请检查，或查看服务器启动时打印的内容。",
    key_change: "更换密钥",
    key_label: "密钥",
    key_note: "保留到关闭此标签页为止，只发送给此服务器。",
    key_use: "使用此密钥",

    // settings
    settings: "设置",
    settings_system: "系统提示词",
    settings_system_hint: "希望模型在此对话中如何表现",
    settings_thinking: "思考",
    settings_sampling: "采样",
    settings_server: "服务器",
    settings_context: "上下文：{n} 个词元",
    settings_unset: "服务器默认",
    settings_reset: "全部重置",
    settings_note: "留空的项不会发送，由服务器使用其默认值。",
    range: "{low} 到 {high}",
    range_above: "大于 {low}，不超过 {high}",
    range_whole: "整数，{low} 到 {high}",
    range_whole_open: "整数，不小于 {low}",
    range_stop: "每行一个，最多 {n} 个；\\n 表示换行",
    bad_number: "“{value}”不是数字：{range}",
    bad_whole: "{value} 不是整数：{range}",
    bad_range: "{value} 超出范围：{range}",
    bad_stop: "停止字符串有 {count} 个，最多 {n} 个",
    p_temperature: "温度",
    p_top_p: "Top p",
    p_top_k: "Top k",
    p_min_p: "Min p",
    p_max_tokens: "回答最大长度（词元）",
    p_repetition_penalty: "重复惩罚",
    p_presence_penalty: "存在惩罚",
    p_frequency_penalty: "频率惩罚",
    p_seed: "随机种子",
    p_stop: "停止字符串",
    p_reasoning_max_tokens: "思考最大长度（词元）",

    // for screen readers
    said_started: "模型开始回答。",
    said_done: "回答已完成。",
    said_stopped: "回答已停止。",
    said_failed: "回答失败：{message}",
  },
};

let language = "en";

export function useLanguage(name) {
  language = Object.hasOwn(strings, name) ? name : "en";
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
}

/** The text of `key` in the current language. */
export function t(key, values = {}) {
  return strings[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** A count or measurement as the language writes it. */
export function number(value, digits = 0) {
  return value.toLocaleString(language, { minimumFractionDigits: digits, maximumFractionDigits: digits });
}
